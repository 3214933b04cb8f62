"""The benchmark of the optimizer's step runs from end to end on a small window, which is full while it is timed."""

import importlib
from pathlib import Path

import pytest
import torch

from mfac_hf import MFAC


@pytest.fixture
def bench(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    return importlib.import_module("bench.optimizer")


def test_step(bench, monkeypatch, capsys):
    fills = []

    class Watched(MFAC):
        def step(self, closure=None):
            fills.append(self.window_stats()["window_fill"])
            return super().step(closure)

    monkeypatch.setattr(bench, "MFAC", Watched)
    rows = bench.benchmark_step(5, 300, 2, torch.device("cpu"))
    assert fills == [0, 1, 1, 1] * 2, "one step makes the window, the others are timed"
    assert [row["window_dtype"] for row in rows] == ["float32", "bfloat16"]
    assert [row["window_gib"] * 2**30 for row in rows] == [5 * 300 * 4, 5 * 300 * 2]
    assert rows[0]["paper_over_mfac"] > 0 and rows[1]["paper_over_mfac"] is None
    for row in rows:
        assert row["mfac_over_adamw"] == pytest.approx(row["mfac_ms"] / row["adamw_ms"])
    bench.print_steps(rows)
    assert "one optimizer step" in capsys.readouterr().out
