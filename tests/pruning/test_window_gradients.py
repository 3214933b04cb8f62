"""The pruner's gradients from an optimizer's window are those of the training steps."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mfac_hf import MFAC
from mfac_hf.pruning.window_gradients import WindowGradients


def train(model, optimizer, steps):
    """Steps with random inputs; returns the gradients of the first layer."""
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=generator)).square().sum().backward()
        seen.append(model[0].weight.grad.flatten().clone())
        optimizer.step()
    return torch.stack(seen)


def collect(source, model, num_grads):
    rows = {}
    source.collect(model, {"0.weight": model[0].weight}, num_grads, 0, rows.__setitem__)
    return rows["0.weight"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_newest_gradients_of_the_window(wrapped):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    optimizer = MFAC(model.parameters(), metric="identity", lr=1e-3, num_grads=4)
    source = WindowGradients(Accelerator(cpu=True).prepare(optimizer) if wrapped else optimizer, None)
    grads_MD = train(model, optimizer, 6)
    assert torch.equal(collect(source, model, 4), grads_MD[2:])
    assert torch.equal(collect(source, model, 3), grads_MD[3:])
    assert source.loss(model) is None


def test_a_window_that_holds_too_few_is_refused():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    optimizer = MFAC(model.parameters(), metric="identity", lr=1e-3, num_grads=4)
    source = WindowGradients(optimizer, None)
    with pytest.raises(ValueError, match="1 gradients were asked for, .* holds 0 of at most 4"):
        source.check(1)
    train(model, optimizer, 3)
    source.check(3)
    with pytest.raises(ValueError, match="4 gradients were asked for, .* holds 3 of at most 4"):
        collect(source, model, 4)
    source.check_at_step(4, 9)
    with pytest.raises(ValueError, match="5 gradients were asked for, .* holds 4 of at most 4"):
        source.check_at_step(5, 9)
    with pytest.raises(ValueError, match="holds 2 of at most 4"):
        source.check_at_step(3, 2)


def test_other_optimizers_are_refused(monkeypatch):
    model = nn.Linear(3, 5)
    with pytest.raises(ValueError, match="needs MFAC as the optimizer, not AdamW"):
        WindowGradients(torch.optim.AdamW(model.parameters()), None)
    monkeypatch.setattr(MFAC, "shares_window", True)
    with pytest.raises(ValueError, match="ranks share it"):
        WindowGradients(MFAC(model.parameters(), metric="identity"), None)
