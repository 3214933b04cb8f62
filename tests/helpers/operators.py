"""The operators of the window, called as the optimizer calls them."""

import torch

from mfac_hf.ops import window


def use_operators() -> None:
    """Both operators, against float64."""
    generator = torch.Generator().manual_seed(0)
    grads, x = torch.randn(3, 50, generator=generator), torch.randn(50, generator=generator)
    weights = torch.randn(3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(window.row_dots(grads, x), grads.double() @ x.double(), rtol=0, atol=1e-5)
    expected = (2 * x.double() + grads.double().T @ weights).float()
    torch.testing.assert_close(window.combine(grads, weights, x, 2.0), expected, rtol=0, atol=1e-5)
