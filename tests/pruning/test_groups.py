"""Targets in groups: as many together as the budget allows."""

import dataclasses

import torch

from mfac_hf.fisher import BlockedFisher
from mfac_hf.pruning import PruningOptions
from mfac_hf.pruning.groups import plan_groups
from tests.helpers.pruning_network import Spy


def test_groups_fill_the_budget_in_the_order_of_the_targets():
    targets = {"a": torch.empty(10), "b": torch.empty(20), "c": torch.empty(20)}
    # by default what is free on the machine is shared with everything else
    assert plan_groups(targets, PruningOptions(), Spy()) == [["a", "b", "c"]]
    options = PruningOptions(block_size=8, num_grads=16)
    small, large = (BlockedFisher.nbytes(size, 8, 16) for size in (10, 20))
    for budget, groups in {
        small + 2 * large: [["a", "b", "c"]],
        small + large: [["a", "b"], ["c"]],
        large: [["a"], ["b"], ["c"]],
    }.items():
        assert plan_groups(targets, dataclasses.replace(options, memory_budget=budget), Spy()) == groups
