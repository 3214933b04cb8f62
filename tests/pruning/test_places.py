"""Places of the weights that are left: vectors are cut to them and spread again."""

import pytest
import torch

from mfac_hf.pruning.patterns import Pattern
from mfac_hf.pruning.places import Places

KEPT = torch.tensor([False, True, True, False, True, False])


def test_vectors_and_rows_are_cut_to_what_is_left_and_spread_again():
    places = Places.of(KEPT, Pattern.parse("unstructured"), 2)
    assert len(places) == 3
    rows = torch.arange(12.0).view(2, 6)
    assert places.cut(rows).tolist() == [[1, 2, 4], [7, 8, 10]] and places.cut(KEPT).all()
    assert places.spread(places.cut(rows[1]), elsewhere=-1.0).tolist() == [-1, 7, 8, -1, 10, -1]
    assert places.spread(places.cut(rows[1]).double()).dtype == torch.float64


@pytest.mark.parametrize("pattern", ["2:4", "block2"])
def test_units_and_windows_of_a_pattern_keep_their_places(pattern):
    places = Places.of(KEPT, Pattern.parse(pattern), 2)
    assert len(places) == 6 and places.cut(KEPT) is KEPT and places.spread(KEPT) is KEPT


def test_all_places_where_nothing_is_pruned_and_one_where_nothing_is_left():
    assert Places.of(torch.ones(4, dtype=torch.bool), Pattern.parse("unstructured"), 2).at_L is None
    none = Places.of(torch.zeros(4, dtype=torch.bool), Pattern.parse("unstructured"), 2)
    assert len(none) == 1 and not none.cut(torch.zeros(4, dtype=torch.bool)).any()


def test_experts_have_no_block_in_common():
    kept = torch.tensor([[True, False, True, True], [True, True, True, True], [False, True, False, True]]).flatten()
    places = Places.of(kept, Pattern.parse("unstructured"), 4, experts=3)
    assert places.at_L.tolist() == [0, 2, 3, 1, 4, 5, 6, 7, 9, 11, 8, 8]
    assert places.spread(places.cut(kept), elsewhere=False).tolist() == kept.tolist()
