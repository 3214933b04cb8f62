"""A plan beside two ranks that do it: bytes to the byte, and a table of both."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    return importlib.import_module("bench.ranks")


def test_the_best_of_each_speed(bench):
    first = bench.Machine(0.0, 1.0, 5.0, 3.0, 9.0, step_overhead=1.0, fresh_bandwidth=2.0)
    second = bench.Machine(0.0, 2.0, 4.0, 1.0, 9.0, step_overhead=2.0, fresh_bandwidth=1.0)
    best = bench.Machine(0.0, 2.0, 5.0, 1.0, 9.0, step_overhead=1.0, fresh_bandwidth=2.0)
    assert bench._fastest([first, second]) == best


@pytest.mark.slow
def test_two_ranks_beside_their_plan(bench, capsys):
    (row,) = bench.benchmark_plan("BERT-tiny", 1, [(2, 1)])
    assert (row["ranks"], row["shards"]) == (2, 1)
    for both in row["bytes_of_collectives"].values():
        assert both["planned"] == both["measured"] > 0
    for name in ("parameters", "gradients"):
        assert row["bytes_held"][name]["planned"] == row["bytes_held"][name]["measured"]
    for name in ("window", "second_moment"):  # words lie unevenly, and position tables take few of their rows
        both = row["bytes_held"][name]
        assert both["planned"] == pytest.approx(both["measured"], rel=0.15)
    assert all(row["seconds"][name]["measured"] > 0 for name in ("computing", "sending", "step"))
    bench.print_plan([row])
    assert "| BERT-tiny | 2 | 1 |" in capsys.readouterr().out
