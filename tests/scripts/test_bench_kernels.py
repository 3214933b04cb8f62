"""The benchmark of the kernels judges rightly; its times are not looked at."""

import pytest
import torch
from bench import kernels

from mfac_hf.ops import build

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def native():
    if not build.load_native("cpu"):
        pytest.skip(f"no native kernels: {build.native_status('cpu')}")


def test_right_kernels_pass_and_are_timed(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "SHAPES", [(7, 8191), (9, 33)])
    monkeypatch.setattr(kernels, "available_bytes", lambda device: 1 << 20)
    results = kernels.benchmark_kernels(CPU, [(5, 1000)], rounds=1)
    assert all(row["passed"] for row in results["checks"]["against_float64"])
    assert results["repeats"] == {"repeats": 200, "passed": True}
    assert results["large"]["passed"] is None and "GiB" in results["large"]["reason"]
    assert [(row["window_dtype"], row["kernel"]) for row in results["timing"]] == [
        ("float32", "row_dots"),
        ("float32", "combine"),
        ("bfloat16", "row_dots"),
        ("bfloat16", "combine"),
    ]
    kernels.print_kernels(results)
    assert "4 of 4 passed" in capsys.readouterr().out


def test_what_is_not_written_or_wrong_or_changes_does_not_pass(monkeypatch):
    right = kernels.row_dots

    def unwritten(grads, x):
        return torch.full((len(grads),), torch.nan, dtype=torch.float64)

    for wrong in (unwritten, lambda grads, x: right(grads, x) * (1 + 1e-4)):
        monkeypatch.setattr(kernels, "row_dots", wrong)
        assert not kernels.check(7, 100, "float32", CPU)["passed"]
    monkeypatch.setattr(kernels, "row_dots", lambda grads, x: right(grads, x) + torch.rand(len(grads)))
    assert not kernels.check_repeats(CPU, repeats=2)["passed"]
