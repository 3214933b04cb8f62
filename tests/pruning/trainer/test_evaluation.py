"""The mean loss over a loader counts examples, in evaluation mode, and leaves no trace."""

import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from mfac_hf.pruning.trainer.evaluation import mean_loss


class Line(nn.Module):
    """Linear regression with dropout, and Trainer's calling convention."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(3, 1), nn.Dropout(0.5)

    def forward(self, x, labels):
        prediction = self.linear(self.dropout(x)).squeeze(-1)
        return type("Output", (), {"loss": nn.functional.mse_loss(prediction, labels)})()


def test_mean_over_examples_without_a_trace():
    torch.manual_seed(0)
    model = Line().train()
    data = [{"x": torch.randn(3), "labels": torch.randn(())} for _ in range(10)]
    x, labels = (torch.stack([row[key] for row in data]) for key in ("x", "labels"))
    states = torch.get_rng_state(), random.getstate()
    loss = mean_loss(model, DataLoader(data, batch_size=4, shuffle=True))
    assert model.training and torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    expected = float((model.linear(x).squeeze(-1) - labels).square().mean().detach())
    assert loss == pytest.approx(expected, rel=1e-6)
    assert model.linear.weight.grad is None

    def loss_fn(model, batch):
        return model(**batch).loss + 1

    assert mean_loss(model, DataLoader(data, batch_size=3), loss_fn) == pytest.approx(expected + 1, rel=1e-6)
