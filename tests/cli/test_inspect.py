"""`mfac inspect`: the table, the picture, and one line for what users can mend."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

from mfac_hf import cli, save_sparse
from mfac_hf.pruning.targets import find_targets


@pytest.mark.slow
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


def test_layers_have_their_names_in_memory(capsys, tmp_path):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {tensor["name"] for tensor in report["tensors"] if tensor["target"]} == set(find_targets(model))
    assert report["targets"]["numel"] == sum(weight.numel() for weight in find_targets(model).values())


STEERING = "[red]a[/]\x1b[2J\x1b]0;title\x07\r\n\u202eb$\\frac$[/blue]"


def test_names_steer_neither_terminal_nor_tables(capsys, tmp_path):
    save_file({STEERING: torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert cli.main(["inspect", str(tmp_path), "--picture", str(tmp_path / "layers.png")]) == 0
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(shown)
    column = "".join(line.split("│")[1].strip() for line in shown.splitlines() if line.count("│") == 6)
    assert column == "[red]a[/]\\x1b[2J\\x1b]0;title\\x07\\r\\n\\u202eb$\\frac$[/blue]"


def test_names_in_errors_do_not_steer_the_terminal(refused, tmp_path):
    index = {"weight_map": {"w": "../" + STEERING}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused("inspect", tmp_path).isprintable()


@pytest.mark.parametrize(
    "config", [{"architectures": ["Trainer"]}, {"architectures": ["BertModel"], "num_layers": 10**9}]
)
def test_configuration_of_no_model_is_one_line(config, bert, refused, tmp_path):
    save_sparse(bert, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "config.json" in refused("inspect", tmp_path)
