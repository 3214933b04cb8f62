"""A small network for ranks that share a window, which trains alike on each of them."""

import torch
from torch import nn

ADAM = {"metric": "adam", "lr": 0.01, "num_grads": 6, "damping": 0.3}
IDENTITY = {"metric": "identity", "lr": 0.05, "num_grads": 6, "damping": 1e-2}
DOUBLE = {"window_dtype": torch.float64}


class Net(nn.Module):
    """A table whose gradients have few rows, matrices of different sizes, and a layer that gets gradients late."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 4)
        self.hidden = nn.Linear(4, 6)
        self.late = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)
        self.to(dtype)

    def backward(self, step):
        ids = torch.randint(50, (6,), generator=torch.Generator().manual_seed(step))
        hidden = self.hidden(self.words(ids).mean(0)).tanh()
        self.head(self.late(hidden) if step >= 5 else hidden).square().sum().backward()


def train(model, optimizer, steps, spoil=()):
    for step in steps:
        optimizer.zero_grad()
        model.backward(step)
        if step in spoil:
            model.head.bias.grad.fill_(torch.nan)
        optimizer.step()


def mask_of(model):
    return {model.hidden.weight: torch.rand(6, 4, generator=torch.Generator().manual_seed(3)) < 0.5}


def assert_same(model, twin, tolerance):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
