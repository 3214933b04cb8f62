"""A sub-step with the Fisher of all targets together, against dense float64 algebra."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from mfac_hf.pruning.engine import prune_to
from mfac_hf.pruning.full_step import full_step
from mfac_hf.pruning.gradient_source import GradientSet
from mfac_hf.pruning.gradients import DataLoaderGradients
from mfac_hf.pruning.masks import MaskSet
from mfac_hf.pruning.options import PruningOptions

OPTIONS = PruningOptions(
    block_size=None, selection="diagonal", num_grads=24, recomputations=1, damping=1e-3, grad_batch_size=2
)


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    data = TensorDataset(torch.randn(60, 6), torch.randint(3, (60,)))
    source = DataLoaderGradients(
        DataLoader(data), loss_fn=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batch_size=2
    )
    masks = MaskSet.dense(model, ["0.weight", "2.weight"])
    first = torch.ones(5, 6, dtype=torch.bool)
    first[1, :3] = False  # pruned before
    masks.update({"0.weight": first})
    masks.apply(model)
    return model, source, masks


def dense_answer(update, sparsity):
    """Masks and weights by the formulas of the paper with the d x d matrix."""
    model, source, masks = problem()
    parameters = masks.parameters(model)
    rows = {name: [] for name in parameters}
    source.collect(model, parameters, OPTIONS.num_grads, 5, lambda name, r: rows[name].append(r.clone()))
    keep = torch.cat([masks[name].flatten() for name in parameters])
    grads = torch.cat([torch.cat(rows[name]) for name in parameters], dim=1).double() * keep
    weights = torch.cat([p.detach().flatten() for p in parameters.values()]).double()
    fisher = OPTIONS.damping * torch.eye(len(weights), dtype=torch.float64) + grads.T @ grads / len(grads)
    inverse = torch.linalg.inv(fisher)
    costs = (weights.square() / (2 * inverse.diagonal())).masked_fill(~keep, -1)
    gone = torch.zeros_like(keep)
    gone[costs.argsort()[: round(sparsity * len(keep))]] = True
    removed, stays = gone & keep, ~gone
    if update == "joint":
        pull = fisher[stays][:, removed] @ weights[removed]
        weights[stays] += torch.linalg.solve(fisher[stays][:, stays], pull)
    elif update == "sum":
        weights = weights - inverse @ torch.where(removed, weights / inverse.diagonal(), 0)
    return stays, weights * stays


@pytest.mark.parametrize("update", ["joint", "sum", "none"])
@pytest.mark.parametrize("pages", [1, 4])
def test_a_step_is_that_of_the_dense_fisher(update, pages):
    model, source, masks = problem()
    taken = []
    step = full_step(
        masks.parameters(model),
        masks,
        0.6,
        dataclasses.replace(OPTIONS, update=update, pages=pages),
        GradientSet(source, model, OPTIONS.num_grads, 5, taken.append),
    )
    stays, weights = dense_answer(update, 0.6)
    assert torch.equal(torch.cat([step.keep[name] for name in masks]), stays)
    # float32 gradients and weights
    assert torch.allclose(torch.cat([step.weights[name] for name in masks]).double(), weights, rtol=1e-4, atol=1e-6)
    assert sum(taken) == OPTIONS.num_grads
    assert step.predicted_loss_increase > 0


def test_several_steps_reach_the_sparsity_and_keep_what_was_pruned():
    model, source, masks = problem()
    before = masks.copy()
    report = prune_to(model, masks, source, 0.7, dataclasses.replace(OPTIONS, recomputations=3), progress=False)
    assert sum(int((~keep).sum()) for keep in masks.values()) == round(0.7 * 45) and report.num_grads == 72
    assert not any(bool((masks[name] & ~before[name]).any()) for name in masks) and not masks.nonzeros(model)


def test_gradients_that_do_not_fit_are_refused(monkeypatch):
    model, source, masks = problem()
    monkeypatch.setattr("mfac_hf.pruning.full_step.available_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match="24 gradients of 42 weights"):
        prune_to(model, masks, source, 0.7, OPTIONS, progress=False)
