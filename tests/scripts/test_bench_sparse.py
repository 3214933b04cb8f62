"""The benchmark of sparse files and inference runs from end to end, on a BERT that is small enough for a test."""

import importlib.util

import pytest
from bench import sparse as bench

SMALL = dict(vocab_size=200, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)


@pytest.mark.slow
def test_sizes(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "zstandard" else find_spec(name))
    row, sparser = bench.benchmark_sizes(1, (0.9, 0.97), **SMALL)
    assert row["dense_bytes"] > row["sparse_bytes"] > sparser["sparse_bytes"]
    assert row["dense_bytes"] > row["csr_bytes"] > sparser["csr_bytes"]
    assert row["ratio"] == row["dense_bytes"] / row["sparse_bytes"]
    assert row["zstd_bytes"] == "not installed"
    assert min(row[f"{key}_seconds"] for key in ("save", "load", "dense_save", "dense_load")) > 0
    bench.print_sizes([row, sparser])
    assert "| 90% | " in capsys.readouterr().out


def test_inference(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find_spec(name))
    rows = bench.benchmark_inference(1, (0.9,), ((2, 16),), **SMALL)
    names = ["torch float32", "sparse", "torch bfloat16", "ONNX Runtime", "ONNX Runtime int8", "OpenVINO"]
    assert [row["contender"] for row in rows] == [*names, "OpenVINO int8"]
    assert rows[0]["speedup"] == 1 and rows[1]["speedup"] == rows[0]["seconds"] / rows[1]["seconds"]
    assert rows[1]["max_output_difference"] <= 1e-5  # rounding in another order
    assert rows[3]["seconds"] == "not installed"
    bench.print_inference(rows)
    assert "| 90% | 2 x 16 | ONNX Runtime | not installed |" in capsys.readouterr().out
