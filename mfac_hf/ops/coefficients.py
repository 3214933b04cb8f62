r"""The paper's coefficient path: inverse of a unit lower triangular matrix, and its products, as dispatcher operators.

The recursions of the paper's dynamic algorithm become, for :math:`M = L D L^\top` with unit lower triangular L, the
"setup" :math:`B = L^{-1} / \lambda` and two triangular products, by B and by its transpose (section 3.2; the published
code has a CUDA kernel for each, for m a multiple of 32). Here m is any number. `mfac_hf.fisher.reference` uses them
for comparisons, the optimizer does not. The PyTorch implementations below answer where no native kernel is registered
(`mfac_hf.ops.registry`).
"""

import torch
from torch import Tensor

from mfac_hf.ops.registry import operators_for, register

__all__ = ["lower_product", "unit_lower_inverse"]


def unit_lower_inverse(lower_MM: Tensor) -> Tensor:
    """Invert a unit lower triangular matrix, shape (m, m), contiguous, float32 or float64.

    What stands on and above the diagonal is not read. The result has zeros above it.
    """
    return operators_for(lower_MM).unit_lower_inverse(lower_MM)


def lower_product(lower_MM: Tensor, x_M: Tensor, *, transposed: bool = False) -> Tensor:
    """Multiply a lower triangular matrix, or its transpose, by a vector of the same dtype; shape (m,).

    What stands above the diagonal is not read.
    """
    return operators_for(lower_MM).lower_product(lower_MM, x_M, transposed)


def _unit_lower_inverse(lower_MM: Tensor) -> Tensor:
    identity_MM = torch.eye(len(lower_MM), dtype=lower_MM.dtype, device=lower_MM.device)
    return torch.linalg.solve_triangular(lower_MM, identity_MM, upper=False, unitriangular=True).contiguous()


def _lower_product(lower_MM: Tensor, x_M: Tensor, transposed: bool) -> Tensor:
    lower_MM = lower_MM.tril()
    return torch.mv(lower_MM.T if transposed else lower_MM, x_M)


def _unit_lower_inverse_fake(lower_MM: Tensor) -> Tensor:
    return torch.empty_like(lower_MM, memory_format=torch.contiguous_format)


def _lower_product_fake(lower_MM: Tensor, x_M: Tensor, transposed: bool) -> Tensor:
    return torch.empty_like(x_M)


register("unit_lower_inverse(Tensor lower_MM) -> Tensor", _unit_lower_inverse, _unit_lower_inverse_fake)
register("lower_product(Tensor lower_MM, Tensor x_M, bool transposed) -> Tensor", _lower_product, _lower_product_fake)
