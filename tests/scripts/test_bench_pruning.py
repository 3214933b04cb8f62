"""The benchmark of the static inverse runs from end to end on small tensors."""

import pytest
from bench import pruning as bench


@pytest.mark.slow
def test_blocked_and_full(capsys):
    assert sum(bench.tensor_sizes()) == 270_896
    blocked = bench.benchmark_blocked(12, 10, rounds=2, sizes=[200, 35])
    full = bench.benchmark_full(12, 3, rounds=2, sizes=[200, 35])
    for row in (blocked, full):
        assert row["dim"] == 235
        assert row["rounds"] == {"ours": 2, "paper": 1}
        assert row["paper_over_ours"] == row["paper_seconds"] / row["ours_seconds"] > 0
        assert row["gradients_gib"] == 12 * 235 * 4 / 2**30
    bench.print_blocked([blocked])
    bench.print_full([full])
    printed = capsys.readouterr().out
    assert "blocked inverse of ResNet-20" in printed
    assert "full inverse of ResNet-20" in printed
