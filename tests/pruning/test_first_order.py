"""First-order steps: the length against known minima, the direction against a dense inverse, and what they bring."""

import math

import pytest
import torch

from mfac_hf.fisher import BlockedFisher
from mfac_hf.pruning import MaskSet, PruningOptions, find_targets, obs, prune_to
from mfac_hf.pruning.first_order import LengthSearch
from tests.helpers.pruning_network import Spy, loader, one_shot, weights


@pytest.mark.parametrize("minimum", [1e-3, 0.011, 0.02, 0.05, 0.7])
def test_the_length_is_within_a_factor_of_two_of_the_best(minimum):
    search = LengthSearch()
    found = search.find(lambda length: (length - minimum) ** 2)
    assert minimum / 2 <= found <= 2 * minimum
    assert search.length == found
    assert search.steps == [{"length": found, "loss_before": minimum**2, "loss_after": (found - minimum) ** 2}]
    tried = []
    search.find(lambda length: tried.append(length) or (length - minimum) ** 2)
    assert len(tried) == 4  # none, the last one, its half and its double


@pytest.mark.parametrize("loss", [lambda length: length, lambda length: math.nan if length else 1.0])
def test_no_step_is_taken_where_none_lowers_the_loss(loss):
    search, tried = LengthSearch(), []
    assert search.find(lambda length: tried.append(length) or loss(length)) == 0
    assert len(tried) == 9 and search.length == 0.02
    assert search.steps[0]["loss_after"] == search.steps[0]["loss_before"] == loss(0.0)


def test_the_direction_is_that_of_a_dense_inverse():
    generator = torch.Generator().manual_seed(0)
    grads_MD, slope_D = torch.randn(9, 10, generator=generator), torch.randn(10, generator=generator)
    keep_D = torch.rand(10, generator=generator) < 0.6
    fisher = BlockedFisher(10, block_size=4, damping=0.1, num_grads=9)
    fisher.add(grads_MD)
    dense_DD = torch.block_diag(*[part.mT @ part / 9 for part in grads_MD.double().split(4, dim=1)])
    dense_DD += 0.1 * torch.eye(10)
    expected_D = torch.zeros(10)
    expected_D[keep_D] = -torch.linalg.solve(dense_DD[keep_D][:, keep_D], slope_D[keep_D].double()).float()
    torch.testing.assert_close(obs.descent_direction(slope_D, keep_D, fisher), expected_D)


@pytest.mark.parametrize("budget", [None, 40_000])
def test_steps_lower_the_loss_and_leave_the_sparsity(model, trained, budget):
    """Also where targets are visited in groups."""
    options = {"data": loader(256), "num_grads": 32, "block_size": 24, "recomputations": 4, "memory_budget": budget}
    without = one_shot(model, 0.8, loss_samples=128, **options)
    assert [step["first_order"] for step in without.steps] == [None] * 4
    model.load_state_dict(trained)
    report = one_shot(model, 0.8, first_order=True, loss_samples=128, **options)
    assert report.sparsity == without.sparsity and report.masks.nonzeros(model) == {}
    assert report.num_grads == without.num_grads + 32  # for the step after the last sub-step
    assert (report.steps[0]["groups"] > 1) == (budget is not None)
    taken = [step["first_order"] for step in report.steps]
    assert all(step["loss_after"] <= step["loss_before"] for step in taken) and any(step["length"] for step in taken)
    assert taken[-1]["loss_after"] == report.loss_after < without.loss_after


def test_a_step_sees_the_examples_of_the_next_substep_at_its_weights(model):
    class Mean(Spy):
        def mean(self, model, parameters, num_grads, seed):
            self.seen.append((seed, weights(model)))
            return super().mean(model, parameters, num_grads, seed)

        def collect(self, model, parameters, num_grads, seed, consume):
            self.seeds.append((seed, weights(model)))
            super().collect(model, parameters, num_grads, seed, consume)

    source = Mean(loss_samples=32)
    source.seen, source.seeds = [], []
    options = PruningOptions(num_grads=16, block_size=8, recomputations=2, first_order=True, loss_samples=32)
    prune_to(model, MaskSet.dense(model, find_targets(model)), source, 0.5, options, progress=False)
    assert [seed for seed, _ in source.seen] == [seed for seed, _ in source.seeds[1:]]
    for (_, at_mean), (_, at_fisher) in zip(source.seen, source.seeds[1:], strict=True):
        assert all(torch.equal(at_mean[name], at_fisher[name]) for name in at_mean)
