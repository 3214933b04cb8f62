"""`mfac card`: the card and its facts, and one line for what users can mend."""

import json
import pathlib

import pytest
from huggingface_hub import ModelCard

from mfac_hf import cli
from mfac_hf.hub.card import build_card


def test_card_and_the_same_card_from_its_facts(outputs, card_flags, capsys):
    target = outputs / "cards" / "sst2-90"
    arguments = ["card", "--model", str(outputs / "sst2-90"), *card_flags, "--output", str(target)]
    assert cli.main([*arguments, "--repo_id", "user/sst2-90", "--license", "mit"]) == 0
    assert capsys.readouterr().out.strip() == str(target / "README.md")
    text = (target / "README.md").read_text()
    assert (
        "| sparse | accuracy | 79.00 | 77.00 ± 2.83 | 1, 2 |" in text and "- Random weights.\n- Random data." in text
    )
    assert ModelCard.load(target / "README.md").data.license == "mit"
    facts = json.loads((target / "card.json").read_text())
    assert str(build_card(facts, "user/sst2-90")) == text
    (target / "README.md").unlink()
    assert cli.main(["card", "--facts", str(target / "card.json"), "--repo_id", "user/sst2-90"]) == 0
    assert (target / "README.md").read_text() == text


def test_card_of_results_beside_the_model(outputs):
    with pytest.raises(SystemExit):
        cli.main(["card"])
    folder = outputs / "sst2-90"
    assert cli.main(["card", "--model", str(folder), "--dense", str(outputs / "dense.json"), "--no_latency"]) == 0
    assert "| sparse | accuracy | 79.00 | - | 1 |" in (folder / "README.md").read_text()


def test_bad_input_is_one_line(outputs, card_flags, refused):
    folder = outputs / "sst2-90"
    assert "the dense model are missing" in refused("card", "--model", folder, "--no_latency")
    assert not (folder / "README.md").exists() and not (folder / "card.json").exists()
    (outputs / "caveats.yaml").write_text("just a sentence")
    assert "expected a YAML list" in refused("card", "--model", folder, *card_flags)
    (folder / "results.json").unlink()
    assert "--results is missing" in refused("card", "--model", folder)


def test_malformed_files_are_one_line_that_names_them(outputs, card_flags, refused):
    folder = outputs / "sst2-90"
    content = json.loads((folder / "results.json").read_text())
    for change, message in (
        ({"results": None}, "results is null; expected an object"),
        ({"command": [1]}, "command[0] is 1; expected text"),
        ({"arguments": [1]}, "arguments is a list of 1; expected an object"),
        ({"results": {**content["results"], "eval_accuracy": float("nan")}}, "accuracy is nan"),
    ):
        (folder / "results.json").write_text(json.dumps({**content, **change}))
        assert f"results.json: {message}" in refused("card", "--model", folder, *card_flags)
    for text, message in (("[1]", "are a list"), ("{", "is no JSON file"), ('{"runs": 3}', "lack name, model")):
        (outputs / "card.json").write_text(text)
        error = refused("card", "--facts", outputs / "card.json")
        assert "card.json" in error and message in error
    (folder / "results.json").write_text(json.dumps(content))
    for text in ("- [1]\n", "a: b\n", "[", "!!python/object:os.system x"):
        (outputs / "caveats.yaml").write_text(text)
        assert "caveats.yaml" in refused("card", "--model", folder, *card_flags)
    assert not (folder / "README.md").exists() and not (folder / "card.json").exists()


@pytest.mark.parametrize("failing", ["card.json", "README.md"])
def test_a_full_disk_leaves_card_and_facts_as_they_were(failing, outputs, card_flags, refused, monkeypatch):
    folder = outputs / "sst2-90"
    assert cli.main(["card", "--model", str(folder), *card_flags]) == 0
    (folder / "README.md").write_text("edited by hand")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_text = pathlib.Path.write_text

    def full(path, *arguments, **options):
        if failing in path.name:
            raise OSError(28, "No space left on device", str(path))
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    error = refused("card", "--model", folder, *card_flags)
    assert str(folder / failing) in error and "No space left" in error
    if failing == "README.md":
        assert str(folder / failing) in refused("card", "--facts", folder / "card.json")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
