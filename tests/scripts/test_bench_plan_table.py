"""The table of plans in docs/several-devices.md is the one that the command makes, of the shapes of real models."""

import importlib
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("bench.plan_table")


@pytest.mark.slow
def test_the_page_has_the_table_that_the_command_makes(bench):
    page = (ROOT / "docs" / "several-devices.md").read_text()
    _, _, rest = page.partition("<!-- plan table -->\n")
    table, end, _ = rest.partition("<!-- end of plan table -->")
    assert end and table.strip() == bench.docs_table().strip(), "python scripts/benchmark.py --plan_table makes it"


def test_shapes_are_those_of_a_classifier_and_of_a_7b_llama(bench):
    config = BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
    with torch.device("meta"):
        expected = sorted(tuple(p.shape) for p in BertForSequenceClassification(config).parameters())
    assert sorted(tuple(p.shape) for p in bench.bert(128, 2).parameters()) == expected
    llama = list(bench.llama_7b(16).parameters())
    assert sum(p.numel() for p in llama if not p.requires_grad) == 6_738_415_616  # of its published weights
    assert sum(p.numel() for p in llama if p.requires_grad) == 39_976_960  # as peft counts them
