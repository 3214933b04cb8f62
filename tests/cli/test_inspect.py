"""`mfac inspect`: the table, the picture, and one line for what users can mend."""

from mfac_hf import cli, save_sparse


def test_inspect_prints_a_table_and_draws_a_picture(bert, refused, capsys, tmp_path):
    save_sparse(bert, tmp_path / "small", sparse_only=True)
    picture = tmp_path / "layers.png"
    assert cli.main(["inspect", str(tmp_path / "small"), "--picture", str(picture)]) == 0
    shown = capsys.readouterr().out
    weight = bert.bert.encoder.layer[0].intermediate.dense.weight
    assert f"{int((weight == 0).sum()) / weight.numel():.2%}" in shown and "(not pruned)" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "--picture" in refused("inspect", tmp_path / "small", "--picture", tmp_path / "layers.text")


def test_bad_input_is_one_line(refused, tmp_path):
    assert "no directory and no repository" in refused("inspect", tmp_path / "nothing")
