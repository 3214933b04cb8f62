"""A sub-step with a Fisher of blocks: against dense formulas and PyTorch's own magnitude pruning, and in groups."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mfac_hf import prune_one_shot
from mfac_hf.fisher import BlockedFisher
from mfac_hf.pruning import MaskSet, PruningOptions, find_targets, prune_to
from tests.helpers.pruning_network import Spy, loader, network, one_shot, weights


def test_the_papers_procedure_is_its_formulas(model):
    """Selection by w² / 2[F⁻¹]ᵢᵢ and the sum of single updates, with a dense inverse and autograd's gradients."""
    name, weight = "2.weight", model[2].weight
    before = weight.detach().double().flatten()
    data = loader().dataset
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()[:16]
    rows = []
    for i in order:
        inputs, label = data[i]
        loss = nn.functional.cross_entropy(model(inputs[None]), label[None])
        rows.append(torch.autograd.grad(loss, weight)[0].flatten().double())
    gradients = torch.stack(rows)
    fisher = 1e-3 * torch.eye(144, dtype=torch.float64) + gradients.T @ gradients / 16
    inverse = torch.linalg.inv(fisher)
    saliency = before.square() / (2 * inverse.diagonal())
    pruned = saliency.argsort()[:72]
    expected = before - sum(before[i] / inverse[i, i] * inverse[:, i] for i in pruned)
    expected[pruned] = 0

    options = {"targets": r"^2\.", "recomputations": 1, "selection": "diagonal", "update": "sum", "block_size": 144}
    report = one_shot(model, 0.5, fisher="empirical", **options)
    # float32 gradients from another batch size
    torch.testing.assert_close(weight.detach().flatten().double(), expected, rtol=1e-4, atol=1e-5)
    step = expected - before
    assert report.predicted_loss_increase == pytest.approx(float(step @ fisher @ step) / 2, rel=1e-3)
    assert list(report.sparsities) == [name] and report.sparsity == 0.5


def test_magnitude_is_pytorchs_global_pruning(model):
    twin = network()
    twin.load_state_dict(model.state_dict())
    layers = [(twin[i], "weight") for i in (0, 2, 4)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.7)
    report = prune_one_shot(model, None, 0.7, method="magnitude")
    for i in (0, 2, 4):
        assert torch.equal(model[i].weight, twin[i].weight)
    assert report.num_grads == 0 and report.predicted_loss_increase is None


def test_the_joint_update_is_the_best_for_the_same_weights(model, trained):
    options = {"selection": "diagonal", "recomputations": 1}
    summed = one_shot(model, 0.6, update="sum", **options)
    model.load_state_dict(trained)
    joint = one_shot(model, 0.6, update="joint", **options)
    assert joint.masks == summed.masks
    assert 0 < joint.predicted_loss_increase < summed.predicted_loss_increase


def test_without_an_update_only_the_choice_is_the_fishers(model, trained):
    options = {"recomputations": 1, "block_size": 48}
    joint = one_shot(model, 0.6, **options)
    model.load_state_dict(trained)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    chosen = one_shot(model, 0.6, update="none", **options)
    assert chosen.masks == joint.masks
    assert chosen.predicted_loss_increase > joint.predicted_loss_increase > 0
    for name, parameter in model.named_parameters():
        expected = before[name] * chosen.masks[name] if name in chosen.masks else before[name]
        assert torch.equal(parameter, expected), name


def test_a_block_has_consecutive_weights_of_those_that_are_left(model):
    """26 of 144 weights are left and a block has 26: the update is the dense one over all of them."""
    weight = model[2].weight
    keep = torch.zeros(144, dtype=torch.bool)
    keep[torch.randperm(144, generator=torch.Generator().manual_seed(3))[:26]] = True
    with torch.no_grad():
        weight.mul_(keep.view_as(weight))
    masks = MaskSet.from_model(model, find_targets(model, [r"^2\."]))
    before, source = weight.detach().flatten().double()[keep], Spy()
    options = PruningOptions(num_grads=32, block_size=26, damping=1e-2, recomputations=1)
    prune_to(model, masks, source, 1 - 16 / 144, options, progress=False)
    gradients = torch.cat(source.collections[0][0]["2.weight"])[:, keep].double()
    fisher = 1e-2 * torch.eye(26, dtype=torch.float64) + gradients.T @ gradients / 32
    left = masks["2.weight"].flatten()[keep]
    assert int(left.sum()) == 16 and not masks["2.weight"].flatten()[~keep].any()
    pull = fisher[left][:, ~left] @ before[~left]
    expected = before[left] + torch.linalg.solve(fisher[left][:, left], pull)
    torch.testing.assert_close(weight.detach().flatten().double()[keep][left], expected, rtol=1e-4, atol=1e-6)
    assert not weight.detach().flatten()[~masks["2.weight"].flatten()].any()


def test_groups_of_targets_give_what_all_at_once_give(model):
    """Passes over the same gradients, before the weights change: rounding of batched products is all that differs."""
    twin = network()
    twin.load_state_dict(model.state_dict())
    options = {"num_grads": 16, "block_size": 8, "damping": 1e-3, "recomputations": 2}
    budget = max(BlockedFisher.nbytes(w.numel(), 8, 16) for w in find_targets(model).values())
    prune_to(twin, MaskSet.dense(twin, find_targets(twin)), Spy(), 0.7, PruningOptions(**options), progress=False)
    source, masks = Spy(), MaskSet.dense(model, find_targets(model))
    grouped = PruningOptions(**options, memory_budget=budget)
    report = prune_to(model, masks, source, 0.7, grouped, progress=False)
    groups = [tuple(rows) for rows, _ in source.collections]
    assert groups == 2 * 2 * [("0.weight",), ("2.weight",), ("4.weight",)]
    assert report.steps[0]["groups"] == 3
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight == 0, other == 0)
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)


def test_a_target_too_large_for_memory_is_refused_with_the_numbers(model):
    before, source = weights(model), Spy()
    options = PruningOptions(block_size=8, num_grads=16, memory_budget=1000)
    with pytest.raises(MemoryError, match=r"0.weight \(96 weights in blocks of 8, 16 gradients\) needs .* budget"):
        prune_to(model, MaskSet.dense(model, find_targets(model)), source, 0.5, options)
    assert source.collections == [] and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
