"""Parameters without a model, gradients for them, and steps of an optimizer with these."""

import torch
from torch import nn

SHAPES = ((4, 3), (5,), (), (2, 1, 3))


def make_params(shapes=SHAPES, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def make_grads(params, steps, seed=1):
    """Gradients for each step, in the type of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]
        for _ in range(steps)
    ]


def feed(optimizer, params, grads):
    """A step with these gradients; None where a parameter has none."""
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else grad.clone()
    return optimizer.step()


def assert_same(params, naive, tolerance=1e-9):
    """The parameters are those of a `tests.helpers.oracles.NaiveMFAC`."""
    for p, expected in zip(params, naive.params, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=tolerance, atol=tolerance)


def values(params):
    """Copies of the parameters as they are now."""
    return [p.detach().clone() for p in params]


def all_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
