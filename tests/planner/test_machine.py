"""Speeds of a machine are checked by name."""

import pytest

from mfac_hf.planner import MACHINES


def test_the_machines_are_possible():
    for machine in MACHINES.values():
        machine.check()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("memory_bandwidth", 0.0, "above 0"),
        ("network_bandwidth", -1.0, "at least 0"),
        ("latency", float("nan"), "a finite number"),
        ("flops", float("inf"), "a finite number"),
        ("step_overhead", -1e-9, "at least 0"),
    ],
)
def test_what_cannot_be_is_refused(name, value, expected):
    with pytest.raises(ValueError, match=f"{name} of the machine is {value}; expected .*{expected}"):
        MACHINES["laptop"]._replace(**{name: value}).check()
