"""The damping: relative to the gradients by default; automatic, by the lowest held-out loss."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from mfac_hf import prune_one_shot
from mfac_hf.fisher import BlockedFisher
from mfac_hf.pruning import MaskSet, PruningOptions, find_targets, prune_to
from mfac_hf.pruning.damping import Dampings, best_proposal
from mfac_hf.pruning.proposal import Proposal
from tests.helpers.pruning_network import Spy, cross_entropy, one_shot


def test_automatic_damping_takes_the_lowest_held_out_loss(model, trained):
    report = one_shot(model, 0.7, damping="auto", loss_samples=24, recomputations=1)
    tried = {entry["damping"]: entry["loss"] for entry in report.steps[0]["damping_losses"]}
    assert len(tried) == 5 == len(set(tried.values()))
    assert report.steps[0]["damping"] == min(tried, key=tried.get)
    assert report.loss_after == min(tried.values())  # the model is that of the choice, not of the last trial
    for damping, loss in tried.items():
        model.load_state_dict(trained)
        fixed = one_shot(model, 0.7, damping=damping, loss_samples=24, recomputations=1)
        assert fixed.loss_after == pytest.approx(loss, rel=1e-4)


def test_later_substeps_keep_the_damping_relative_to_their_gradients(model):
    masks, source = MaskSet.dense(model, find_targets(model)), Spy(loss_samples=24)
    options = PruningOptions(num_grads=16, block_size=8, damping="auto", recomputations=3)
    report = prune_to(model, masks, source, 0.9, options, progress=False)
    relative = []
    for step, (rows, weights_) in zip(report.steps, source.collections, strict=True):
        kept = {name: (weights_[name] != 0).flatten() for name in masks}
        squares = torch.cat([torch.cat(parts)[:, kept[name]].flatten() for name, parts in rows.items()]).square()
        relative.append(step["damping"] / float(squares.mean()))
    assert relative[0] == pytest.approx(min((1e-3, 1e-2, 1e-1, 1, 10), key=lambda value: abs(value - relative[0])))
    assert relative == pytest.approx([relative[0]] * 3, rel=1e-4)
    assert [len(step["damping_losses"]) for step in report.steps] == [5, 0, 0]
    assert len({step["damping"] for step in report.steps}) == 3


@pytest.mark.slow
def test_the_scaled_default_is_relative_to_the_gradients_in_every_kind_of_step(model, trained):
    def damping(memory_budget=None, **options):
        model.load_state_dict(trained)
        masks, source = MaskSet.dense(model, find_targets(model)), Spy(loss_samples=24)
        chosen = PruningOptions(num_grads=16, **{"block_size": 8, **options}, memory_budget=memory_budget)
        report = prune_to(model, masks, source, 0.6, chosen, progress=False)
        rows = source.collections[0][0].values()
        squares = torch.cat([torch.cat(parts).flatten() for parts in rows]).square()
        return report.steps[0]["damping"], report.steps[0]["groups"], float(squares.mean())

    found, groups, mean_square = damping()
    assert groups == 1 and found == pytest.approx(0.03 * mean_square, rel=1e-5)
    in_groups, groups, _ = damping(memory_budget=BlockedFisher.nbytes(144, 8, 16))
    assert groups > 1 and in_groups == pytest.approx(found, rel=1e-5)
    assert damping(block_size=None, selection="diagonal")[0] == pytest.approx(found, rel=1e-5)
    assert damping(first_order=True)[0] == pytest.approx(found, rel=1e-5)
    assert damping(fisher="scaled", damping=2e-4)[0] == 2e-4


def test_the_scaled_default_prunes_alike_where_weights_and_gradients_have_another_unit():
    """Ten times the weights and a tenth of the inputs: the same function, and a hundredth of the squared gradients."""

    def pruned(unit, **options):
        torch.manual_seed(0)
        model, inputs = torch.nn.Linear(8, 3, bias=False), torch.randn(64, 8)
        labels = inputs[:, :3].argmax(dim=1)
        with torch.no_grad():
            model.weight.mul_(unit)
        data = DataLoader(TensorDataset(inputs / unit, labels), batch_size=4)
        settings = {"num_grads": 32, "block_size": 8, "progress": False, "targets": ["weight"], **options}
        prune_one_shot(model, data, 0.5, loss_fn=cross_entropy, **settings)
        return model.weight.detach() / unit

    torch.testing.assert_close(pruned(10.0), pruned(1.0), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(pruned(10.0, damping=1e-2), pruned(1.0, damping=1e-2), rtol=1e-2)


def proposal(damping, weights, level=0.5):
    return Proposal(level, weights, {}, damping=damping, relative_damping=damping / 2)


def test_dampings_are_absolute_or_follow_the_gradients():
    fixed, auto = (Dampings.of_options(PruningOptions(damping=damping)) for damping in (1e-4, "auto"))
    assert fixed.absolute(7.0) == [1e-4] and fixed.after(proposal(1e-4, {})) == fixed
    assert auto.absolute(2.0) == [2e-3, 2e-2, 0.2, 2.0, 20.0]
    assert auto.after(proposal(0.2, {})).absolute(30.0) == [3.0]
    with pytest.raises(ValueError, match="all gradients are zero"):
        auto.absolute(0.0)


def test_the_proposal_is_judged_at_the_last_level_and_taken_at_the_first():
    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

    class Distance:
        """A held-out loss: how far the weight is from 3; no number beyond 9."""

        def loss(self, model):
            return abs(float(model.weight.detach()) - 3) if float(model.weight.detach()) < 9 else float("nan")

    model, values = Line(), {1e-3: 9.0, 1e-2: 5.0, 1e-1: 4.0, 1.0: float("inf"), 10.0: 8.0}
    proposals = []
    for damping, value in values.items():
        # At the first level another damping would win.
        proposals.append(proposal(damping, {"weight": torch.tensor([3.0 if damping == 10 else 0.0])}, level=0.3))
        proposals.append(proposal(damping, {"weight": torch.tensor([value])}, level=0.6))
    with torch.no_grad():
        chosen, tried = best_proposal(model, dict(model.named_parameters()), proposals, Distance())
        assert chosen is proposals[4]
        assert [entry["loss"] for entry in tried] == [None, 2.0, 1.0, None, 5.0]
        assert [entry["damping"] for entry in tried] == list(values)
        alone = [proposal(1e-3, {"weight": torch.ones(1)})]
        assert best_proposal(model, dict(model.named_parameters()), alone, None) == (alone[0], [])
    assert float(model.weight.detach()) == 8.0, "a single damping is not tried"


@pytest.mark.parametrize("first", ["dense", "fully pruned"])
def test_groups_of_targets_have_the_dampings_of_all_targets_together(first, model, trained):
    """Even where the first group has no weight left, and so no gradient."""
    budget = BlockedFisher.nbytes(model[2].weight.numel(), 8, 16)
    assert budget >= BlockedFisher.nbytes(model[0].weight.numel(), 8, 16)
    reports = {}
    for memory_budget in (None, budget):
        model.load_state_dict(trained)
        masks = MaskSet.dense(model, find_targets(model))
        if first == "fully pruned":
            masks.update({"0.weight": torch.zeros_like(masks["0.weight"])})
            masks.apply(model)
        options = PruningOptions(
            num_grads=16, block_size=8, damping="auto", loss_samples=24, recomputations=2, memory_budget=memory_budget
        )
        reports[memory_budget] = prune_to(model, masks, Spy(loss_samples=24), 0.8, options, progress=False)
    assert [step["groups"] for step in reports[budget].steps] == [3, 3]
    for alone, together in zip(reports[budget].steps, reports[None].steps, strict=True):
        assert alone["damping"] == pytest.approx(together["damping"], rel=1e-5)
        assert [d["damping"] for d in alone["damping_losses"]] == pytest.approx(
            [d["damping"] for d in together["damping_losses"]], rel=1e-5
        )
