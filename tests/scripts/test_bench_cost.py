"""The cost of a step in Adam's metric: bytes of the floor, shapes, and rows from end to end on a small model."""

import importlib
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from mfac_hf import MFAC


@pytest.fixture
def bench(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    return importlib.import_module("bench.cost")


def test_the_floor_counts_each_array_as_often_as_it_has_to_move(bench):
    d, m, b = 1000, 8, 2
    gradient, moment, parameter = 4 * d, 4 * d, 4 * d
    first = gradient + 2 * moment + m * b * d  # one row is written, the others are read
    second = m * b * d + moment + 2 * parameter
    assert bench.bytes_moved(d, m, b) == first + second


def test_shapes_are_those_of_a_bert(bench):
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128
    )
    expected = sorted(tuple(p.shape) for p in BertModel(config).parameters())
    assert sorted(bench.bert_shapes(32, 3, 50)) == expected
    counts = {name: sum(torch.Size(shape).numel() for shape in shapes) for name, shapes in bench.MODELS.items()}
    assert [round(counts[name] / 1e5) / 10 for name in ("0.4M", "4.4M", "23M", "110M")] == [0.4, 4.4, 22.7, 109.5]


def test_rows_are_of_full_windows(bench, monkeypatch, capsys):
    fills, dims = [], sum(torch.Size(shape).numel() for shape in bench.bert_shapes(8, 1, 20))

    class Watched(MFAC):
        def step(self, closure=None):
            fills.append(self.window_stats()["window_fill"])
            return super().step(closure)

    monkeypatch.setattr(bench, "MFAC", Watched)
    monkeypatch.setitem(bench.MODELS, "tiny", bench.bert_shapes(8, 1, 20))
    rows = bench.benchmark_cost("tiny", 4, 2, torch.device("cpu"))
    assert fills == [0, 0.25, 0.5, 0.75, 1, 1, 1] * 2, "four steps fill it, one warms up, two are timed"
    assert [(row["window_dtype"], row["bytes_per_parameter"]) for row in rows] == [("float32", 20), ("bfloat16", 12)]
    for row in rows:
        assert row["dim"] == dims and row["floor_ms"] > 0 and row["mfac_over_floor"] > 0 and row["mfac_over_fused"] > 0
    bench.print_cost(rows)
    assert "one step in Adam's metric" in capsys.readouterr().out
