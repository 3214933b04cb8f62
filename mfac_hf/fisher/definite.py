"""Symmetric positive definite matrices in batches: factors, inverses and solutions, or an error that says what to do.

Every matrix here is a damped Fisher or Gram matrix. One that is not positive definite in float64 has too small a
damping for the size of its gradients.

Shape suffixes: K matrices, B their rows, M gradients, D parameters.
"""

from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from mfac_hf.ops.blocks import cholesky, dual_inverse, spd_inverse, spd_solve

__all__ = ["check_damping", "dual_blocks", "factor_blocks", "inverse_blocks", "is_number", "solve_blocks"]


def is_number(value: Any) -> bool:
    """Whether a value is a real number, of Python or numpy, or a tensor that holds one; texts and booleans are not.

    >>> [is_number(value) for value in (1e-4, 3, torch.tensor(0.5), "1e-4", None, True)]
    [True, True, True, False, False, False]
    """
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, Real) and not isinstance(value, bool)


def check_damping(value: float) -> float:
    """The damping as a float; a ValueError unless it is a finite number above 0."""
    if not is_number(value) or not 0.0 < value < float("inf"):
        raise ValueError(f"damping is {value!r}; expected a finite number above 0 (1e-4 to 1e-7 are usual)")
    return float(value)


def factor_blocks(matrices_KBB: Tensor) -> Tensor:
    """Cholesky factors (lower) of a batch of matrices.

    Raises:
        FloatingPointError: if one is not positive definite.
    """
    factor_KBB, info_K = cholesky(matrices_KBB)
    _check_definite(matrices_KBB, info_K)
    return factor_KBB


def dual_blocks(grads_MD: Tensor, block_size: int, damping: float, x_D: Tensor | None = None) -> Tensor:
    r"""The diagonal of each block's :math:`F_b^{-1}` from the m x m system of its gradients, or :math:`F_b^{-1} x`.

    With :math:`F_b = \lambda I + G_b^\top G_b / m`, :math:`F_b^{-1} = (I - G_b^\top (m \lambda I + G_b G_b^\top)^{-1}
    G_b) / \lambda`.

    Args:
        grads_MD: gradients as rows, float32 or float64.
        block_size: consecutive columns that make a block; the last one may be shorter.
        damping: :math:`\lambda`.
        x_D: a float64 vector to multiply; None for the diagonal.

    Raises:
        FloatingPointError: a system is not positive definite.
    """
    found_D, info_K = dual_inverse(grads_MD, block_size, len(grads_MD) * damping, x_D)
    if bool(info_K.any()):
        columns = slice((bad := int(info_K.nonzero()[0])) * block_size, (bad + 1) * block_size)
        _refuse(float(grads_MD[:, columns].double().square().sum()) + len(grads_MD) ** 2 * damping)
    return found_D.div_(damping)


def inverse_blocks(matrices_KBB: Tensor) -> Tensor:
    """Inverses of a batch of matrices.

    Raises:
        FloatingPointError: if one is not positive definite.
    """
    inverse_KBB, info_K = spd_inverse(matrices_KBB)
    _check_definite(matrices_KBB, info_K)
    return inverse_KBB


def solve_blocks(matrices_KBB: Tensor, x_KB: Tensor) -> Tensor:
    """Solutions of a batch of systems, one right-hand side each.

    >>> matrices_KBB = torch.tensor([[[4.0, 0.0], [0.0, 16.0]]], dtype=torch.float64)
    >>> solve_blocks(matrices_KBB, torch.tensor([[1.0, 1.0]], dtype=torch.float64)).tolist()
    [[0.25, 0.0625]]

    Raises:
        FloatingPointError: if a matrix is not positive definite.
    """
    solution_KB, info_K = spd_solve(matrices_KBB, x_KB)
    _check_definite(matrices_KBB, info_K)
    return solution_KB


def _check_definite(matrices_KBB: Tensor, info_K: Tensor) -> None:
    if bool(info_K.any()):
        _refuse(float(matrices_KBB[int(info_K.nonzero()[0])].trace()))


def _refuse(trace: float) -> NoReturn:
    raise FloatingPointError(
        f"a damped Fisher or Gram matrix of trace {trace:g} is not positive definite in float64: raise the damping"
    )
