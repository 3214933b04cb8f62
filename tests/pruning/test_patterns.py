"""Sparsity patterns: names, what they fit, and the constraint of N:M on costs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfac_hf.pruning.patterns import Pattern


def test_names():
    assert Pattern.parse("unstructured") == Pattern("unstructured", unit=1, window=1, kept=0)
    assert Pattern.parse("2:4") == Pattern("2:4", unit=1, window=4, kept=2)
    assert Pattern.parse("block4") == Pattern("block4", unit=4, window=1, kept=0)
    assert Pattern.parse(Pattern.parse("1:8")) == Pattern.parse("1:8")
    assert [Pattern.parse(name).span for name in ("unstructured", "3:5", "block16")] == [1, 5, 16]
    assert [Pattern.parse(name).max_sparsity for name in ("unstructured", "1:4", "block4")] == [1, 0.75, 1]


@pytest.mark.parametrize("name", ["", "2", "4:4", "0:4", "5:4", "2:4:8", "block", "block1", "block-4", "2:4 ", "nm"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"pattern is {name!r}"):
        Pattern.parse(name)


@pytest.mark.parametrize("name", ["2:4", "block4"])
def test_widths_and_blocks_have_to_be_multiples(name):
    pattern = Pattern.parse(name)
    pattern.check("w", torch.zeros(3, 8), block_size=52)
    pattern.check("conv", torch.zeros(3, 2, 2, 3), block_size=4)
    pattern.check("flat", torch.zeros(8))
    with pytest.raises(ValueError, match=r"w has rows of 6 weights .* not a multiple of 4"):
        pattern.check("w", torch.zeros(2, 6))  # 12 weights, but a group would reach over two rows
    with pytest.raises(ValueError, match="block_size is 50, not a multiple of 4.*use 52"):
        pattern.check("w", torch.zeros(2, 8), block_size=50)
    Pattern.parse("unstructured").check("w", torch.zeros(2, 7), torch.tensor([[1] * 6 + [0]] * 2).bool(), 50)


@pytest.mark.parametrize(
    ("name", "fits", "breaks"),
    [("2:4", [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], [1, 0, 0, 0]), ("block4", [[0] * 4, [1] * 4], [1, 1, 1, 0])],
)
def test_masks_so_far_have_to_fit(name, fits, breaks):
    keep = torch.tensor(fits).bool()
    pattern = Pattern.parse(name)
    pattern.check("w", torch.zeros(len(fits), 4), keep)
    with pytest.raises(ValueError, match=f"1 of its {len(fits) + 1} groups of 4"):
        pattern.check("w", torch.zeros(len(fits) + 1, 4), torch.cat([keep, torch.tensor([breaks]).bool()]))


@given(st.data(), st.sampled_from([(2, 4), (1, 4), (3, 5), (4, 8)]))
def test_restricted_costs_leave_the_dearest_of_each_window(data, sizes):
    kept, window = sizes
    # Few distinct values, so that ties are common, and pruned units (infinite) as far as the pattern allows.
    costs = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=3 * window, max_size=3 * window))
    )
    for group in costs.view(3, window):
        group[: data.draw(st.integers(0, window - kept))] = float("inf")
    restricted = Pattern(f"{kept}:{window}", window=window, kept=kept).restrict(costs)
    for before, after in zip(costs.view(3, window), restricted.view(3, window), strict=True):
        stays = after.isinf() & ~before.isinf()
        assert int(stays.sum()) == kept
        goes = after[~after.isinf()]
        assert len(goes) == 0 or goes.max() <= before[stays].min()
    assert torch.equal(Pattern.parse("unstructured").restrict(costs), costs)
