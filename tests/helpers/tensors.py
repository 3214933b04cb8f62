"""Random tensors and errors for tests of the linear algebra."""

import torch


def draw(count, dim, seed=0, dtype=torch.float64):
    """Normal gradients as rows, (count, dim): the same numbers in every dtype, rounded."""
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_error(found, exact):
    """Length of the error over that of the exact result."""
    return float((found.double() - exact).norm() / exact.norm())
