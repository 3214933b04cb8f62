"""The soak: runs that are killed go on to the bits of one that is not, and what differs is found."""

import json
from pathlib import Path

import pytest
import soak
import torch

from mfac_hf.storage import write_json


@pytest.mark.slow
def test_a_run_is_killed_and_ends_with_the_same_bits(tmp_path):
    assert soak.main(["--minutes", "0.05", "--ranks", "1", "--output", str(tmp_path / "soak.json")]) == 0
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["faults"] == [] and report["lives"] >= 1
    assert report["starts"] == 1 + report["lives"] + report["kills"]


def test_other_bits_are_found(tmp_path):
    values = {"weights": {"w": torch.ones(3)}, "random state": [torch.zeros(2), (1, None)]}
    tester = soak.Soak(tmp_path, seed=0)
    tester.expected[2] = {f"{name} of rank {r}": soak.digest(value) for r in (0, 1) for name, value in values.items()}

    def other(values, was_over=False):
        for rank in (0, 1):
            part = values if rank else {"weights": {"w": torch.ones(3)}, "random state": [torch.zeros(2), (1, None)]}
            write_json(Path(tmp_path, f"digests-{rank}.json"), {name: soak.digest(part[name]) for name in part})
        return tester.other_bits(tmp_path, 2, was_over=was_over)

    assert other(values) == []
    assert other(values | {"random state": [torch.ones(2), (1, None)]}) == ["random state of rank 1"]
    assert other(values | {"random state": [torch.zeros(2), (2, None)]}, was_over=True) == []
    values["weights"] = {"w": torch.nextafter(torch.ones(3), torch.full((3,), 2.0))}
    assert other(values, was_over=True) == ["weights of rank 1"]
