"""Cards in the repository are what the code makes of their facts: nobody wrote them by hand."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mfac_hf.hub.card import build_card

FOLDER = Path(__file__).resolve().parents[1] / "model_cards"
CARDS = sorted(path.parent.name for path in FOLDER.glob("*/card.json"))


def test_there_are_cards_and_no_weights():
    assert CARDS
    assert {path.name for path in FOLDER.glob("*/*")} == {"README.md", "card.json"}


@pytest.mark.parametrize("name", CARDS)
def test_card_is_made_from_its_facts(name):
    facts = json.loads((FOLDER / name / "card.json").read_text())
    assert (FOLDER / name / "README.md").read_text() == str(build_card(facts)), f"mfac card --facts {name}/card.json"
    card = ModelCard.load(FOLDER / name / "README.md")
    (result,) = card.data.eval_results
    assert result.metric_value == facts["runs"][0]["metrics"]["accuracy"]
    assert facts["caveats"], "a card says what is wrong with its data and weights"
