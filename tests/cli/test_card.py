"""`mfac card`: the card and its facts, and one line for what users can mend."""

import json

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
