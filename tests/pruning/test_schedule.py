"""Schedules rise, start and end where they were told to, and refuse what they cannot mean."""

import doctest
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_hf.pruning import schedule as module
from mfac_hf.pruning.schedule import SparsitySchedule

CURVES = {
    "linear": lambda s0, s1, tau: s0 + (s1 - s0) * tau,
    "cubic": lambda s0, s1, tau: s1 + (s0 - s1) * (1 - tau) ** 3,
    "geometric": lambda s0, s1, tau: 1 - (1 - s0) * ((1 - s1) / (1 - s0)) ** tau,
}
sparsities = st.floats(0.0, 0.999, exclude_max=True)


@st.composite
def curve_arguments(draw):
    initial, final = sorted((draw(sparsities), draw(sparsities.filter(bool))))
    start, length, every = draw(st.integers(0, 50)), draw(st.integers(1, 300)), draw(st.integers(1, 400))
    return {"initial": initial, "final": final, "start": start, "end": start + length, "every": every}


@given(st.sampled_from(sorted(CURVES)), curve_arguments())
def test_curves_rise_from_initial_to_final_along_the_formula(kind, arguments):
    schedule = getattr(SparsitySchedule, kind)(**arguments)
    initial, final, start, end, every = arguments.values()
    positions, values = zip(*schedule.points, strict=True)
    assert list(positions) == sorted(set(positions)) and list(values) == sorted(set(values))
    assert values[-1] == schedule.final == final and start <= positions[0] and positions[-1] <= end
    assert all((position - start) % every == 0 or position == end for position in positions)
    for position in {start, *range(start, end, every), end}:
        # 1e-12: both sides are a few roundings of numbers below 1.
        expected = CURVES[kind](initial, final, (position - start) / (end - start))
        assert math.isclose(schedule.sparsity_at(position), expected, abs_tol=1e-12)
    assert schedule.sparsity_at(start) == initial, "exact at both ends"
    assert start == 0 or schedule.sparsity_at(start - 1) == 0.0
    assert schedule.sparsity_at(end + 1000) == final


@given(st.lists(sparsities, min_size=1, max_size=8).filter(any), st.integers(1, 5), st.integers(0, 9))
def test_a_list_is_followed_in_order(values, every, start):
    values = sorted(values)
    schedule = SparsitySchedule.from_list(values, every=every, start=start)
    assert schedule.unit == "epoch"
    for i, value in enumerate(values):
        begin = start + i * every
        assert schedule.sparsity_at(begin) == schedule.sparsity_at(begin + every - 0.01) == value
    assert len(schedule.points) == len(set(values) - {0.0}), "a point that asks for nothing is none"


def test_the_list_of_the_paper_starts_at_epoch_0():
    schedule = SparsitySchedule.from_list([0.5, 0.75, 0.875], every=2, unit="epoch")
    assert [schedule.sparsity_at(epoch) for epoch in range(6)] == [0.5, 0.5, 0.75, 0.75, 0.875, 0.875]


def test_the_last_pruning_falls_on_end_where_every_does_not_divide_the_way():
    schedule = SparsitySchedule.linear(final=0.5, start=2, end=9, every=3)
    assert [position for position, _ in schedule.points] == [5, 8, 9]


def test_epochs_in_steps():
    schedule = SparsitySchedule.from_list([0.5, 0.75], every=2)
    assert schedule.in_steps(7) == SparsitySchedule(((0, 0.5), (14, 0.75)), "step")
    assert schedule.in_steps(7).in_steps(3) == schedule.in_steps(7)


def test_equal_schedules_are_equal():
    assert SparsitySchedule.linear(final=0.5, end=2) == SparsitySchedule.from_list([0, 0.25, 0.5], unit="step")
    assert SparsitySchedule.linear(final=0.5, end=2) != SparsitySchedule.linear(final=0.5, end=2, unit="epoch")


def test_doctests():
    assert doctest.testmod(module).attempted >= 4 and doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparsitySchedule.from_list([0.5, 1.0]), r"sparsity 1.0 at epoch 1; expected a number in \[0, 1\)"),
        (lambda: SparsitySchedule.from_list([-0.1]), "sparsity -0.1"),
        (lambda: SparsitySchedule.from_list([math.nan]), "sparsity nan"),
        (lambda: SparsitySchedule.from_list([0.5, 0.4]), "falls from 0.5 to 0.4 at epoch 1"),
        (lambda: SparsitySchedule.from_list([]), "prunes nothing"),
        (lambda: SparsitySchedule.from_list([0.0, 0.0]), "prunes nothing"),
        (lambda: SparsitySchedule.from_list([0.5], every=0), "every is 0; expected a whole number of at least 1"),
        (lambda: SparsitySchedule.from_list([0.5], start=-1), "start is -1"),
        (lambda: SparsitySchedule.from_list([0.5], unit="batch"), "unit is 'batch'"),
        (lambda: SparsitySchedule.linear(final=0.5, start=4, end=4), "starts at step 4 and ends at step 4"),
        (lambda: SparsitySchedule.linear(final=0.5, end=4, every=0.5), "every is 0.5"),
        (lambda: SparsitySchedule.cubic(initial=0.6, final=0.5, end=4), "falls from 0.6 to 0.5"),
        (lambda: SparsitySchedule.geometric(final=1.5, end=4), "sparsity 1.5 at step 4"),
        (lambda: SparsitySchedule(((3, 0.2), (3, 0.4))), "step 3 comes after step 3; positions must rise"),
        (lambda: SparsitySchedule(((math.inf, 0.2),)), "a position is inf"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
