"""Sub-steps: how far each goes, what it sees, and what an exception leaves behind."""

import pytest
import torch
from torch import nn

from mfac_hf import prune_one_shot
from mfac_hf.pruning import MaskSet, PruningOptions, find_targets, prune_to
from mfac_hf.pruning.engine import check_targets, substep_sparsity
from mfac_hf.pruning.gradients import DataLoaderGradients
from tests.helpers.pruning_network import Spy, cross_entropy, loader, one_shot, weights


def test_substeps_are_geometric_in_the_density(model):
    assert substep_sparsity(0.5, 0.9, 4, 4) == pytest.approx(0.9)
    densities = [1 - substep_sparsity(0.5, 0.9, step, 4) for step in range(5)]
    ratios = [after / before for before, after in zip(densities, densities[1:], strict=False)]
    assert ratios == pytest.approx([0.2**0.25] * 4)
    report = one_shot(model, 0.9, recomputations=4)
    expected = [round(276 * (1 - 0.1 ** (step / 4))) / 276 for step in range(1, 5)]
    assert [step["sparsity"] for step in report.steps] == pytest.approx(expected)
    assert report.num_grads == 64


def test_each_substep_has_new_gradients_of_the_weights_that_are_left(model):
    masks, source = MaskSet.dense(model, find_targets(model)), Spy()
    prune_to(model, masks, source, 0.9, PruningOptions(num_grads=16, block_size=8, recomputations=3), progress=False)
    seen = [after for _, after in source.collections]
    assert len(seen) == 3
    counts = [sum(int((w[name] == 0).sum()) for name in masks) for w in seen]
    assert counts == [round(276 * substep_sparsity(0, 0.9, step, 3)) for step in range(3)]
    first, second = (torch.cat(rows["4.weight"]) for rows, _ in source.collections[:2])
    assert first.shape == second.shape == (16, 36)
    assert not any(torch.allclose(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_on_the_way_leaves_everything_as_it_was(model, error):
    class Failing(Spy):
        def collect(self, *args):
            if len(self.collections) == 2:
                raise error("now")
            super().collect(*args)

    masks, before, source = MaskSet.dense(model, find_targets(model)), weights(model), Failing()
    with pytest.raises(error, match="now"):
        prune_to(model, masks, source, 0.9, PruningOptions(num_grads=8, block_size=8), progress=False)
    assert len(source.collections) == 2
    assert not torch.equal(source.collections[1][1]["2.weight"], before["2.weight"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert masks.sparsity == 0


def test_targets_on_several_devices_are_refused(model, monkeypatch):
    masks = MaskSet.dense(model, ["0.weight", "2.weight"])
    elsewhere = {"0.weight": model[0].weight, "2.weight": nn.Parameter(torch.empty(12, 12, device="meta"))}
    monkeypatch.setattr(masks, "parameters", lambda model: elsewhere)
    with pytest.raises(ValueError, match=r"several devices \(cpu, meta\)"):
        check_targets(model, masks, 0.5, PruningOptions())


def test_gradients_are_needed_where_they_are_used(model):
    with pytest.raises(ValueError, match="'mfac' needs gradients"):
        prune_one_shot(model, None, 0.5)
    with pytest.raises(ValueError, match="no data loader"):
        prune_one_shot(model, None, 0.5, method="magnitude", loss_samples=3)
    without = DataLoaderGradients(loader(), loss_fn=cross_entropy)
    masks = MaskSet.dense(model, find_targets(model))
    with pytest.raises(ValueError, match="fisher is 'empirical', and the source's gradients are for the 'scaled' one"):
        prune_to(model, masks, without, 0.5, PruningOptions(fisher="empirical"))
    with pytest.raises(ValueError, match="judged on held-out examples"):
        prune_to(model, masks, without, 0.5, PruningOptions(damping="auto"))
    with pytest.raises(ValueError, match="another model"):
        prune_to(nn.Linear(2, 2), masks, without, 0.5, PruningOptions())
