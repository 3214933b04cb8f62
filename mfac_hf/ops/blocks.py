"""Sums, inverses and solutions of many small symmetric positive definite matrices, as dispatcher operators.

PyTorch's batched float64 Cholesky calls LAPACK once for each matrix, which is slow where matrices have a few dozen
rows, and its batched products know nothing of symmetry. So there are native kernels, and the PyTorch implementations
below answer where none is registered (`mfac_hf.ops.registry`).

Shape suffixes: K matrices, B their rows, N gradients, D parameters, P width of a panel.
"""

import torch
from torch import Tensor

from mfac_hf.ops.registry import operators_for, register

__all__ = ["add_gram", "spd_inverse", "spd_solve"]

# Rows of the largest matrices for the native kernels, which hold one in a core's own cache. Beyond, PyTorch is faster:
# its threads share a matrix.
NATIVE_ROWS = 512

# Bytes of the float64 copy that PyTorch multiplies at once: it should stay in a core's own cache.
COPY_BYTES = 1 << 20


def add_gram(sums_KBP: Tensor, grads_ND: Tensor, block_size: int, start: int) -> None:
    r"""Add a panel of :math:`G_b^\top G_b` for each block b, in float64.

    Args:
        sums_KBP: columns ``start`` to ``start + P`` of the sums, from row ``start`` on; float64, contiguous.
        grads_ND: gradients as rows. :math:`G_b` has ``block_size`` consecutive columns of them, zeros beyond the end.
        block_size: columns of a block.
        start: the first row and column of the panel.

    Raises:
        RuntimeError: shapes do not fit; from a native kernel also for another dtype or layout.
    """
    if block_size > NATIVE_ROWS:
        return _add_gram(sums_KBP, grads_ND, block_size, start)
    operators_for(grads_ND).add_gram(sums_KBP, grads_ND, block_size, start)


def blocks_of(grads_ND: Tensor, block_size: int, first: int, last: int) -> Tensor:
    """Copy the columns of blocks ``first`` to ``last`` to float64, shape (k, n, b), with zeros beyond the end."""
    columns_ND = grads_ND[:, first * block_size : last * block_size]
    missing = (last - first) * block_size - columns_ND.shape[1]
    if missing:
        columns_ND = torch.nn.functional.pad(columns_ND, (0, missing))
    grads_KNB = columns_ND.unflatten(1, (last - first, block_size)).transpose(0, 1)
    return grads_KNB.to(torch.float64, memory_format=torch.contiguous_format)


def spd_inverse(matrices_KBB: Tensor) -> tuple[Tensor, Tensor]:
    """Invert each matrix by its Cholesky factor.

    Args:
        matrices_KBB: symmetric matrices, float64, contiguous.

    Returns:
        The inverses, shape (k, b, b), NaN where a matrix is not positive definite; and int32 numbers, shape (k,): 0
        where it is, else the order of the first leading minor that is not.

    Raises:
        RuntimeError: the matrices are not square; from a native kernel also for another dtype or layout.
    """
    if matrices_KBB.shape[-1] > NATIVE_ROWS:
        return _spd_inverse(matrices_KBB)
    return operators_for(matrices_KBB).spd_inverse(matrices_KBB)


def spd_solve(matrices_KBB: Tensor, x_KB: Tensor) -> tuple[Tensor, Tensor]:
    """Solve a system with each matrix by its Cholesky factor.

    Args:
        matrices_KBB: symmetric matrices, float64, contiguous.
        x_KB: a right-hand side for each, float64, contiguous.

    Returns:
        The solutions, shape (k, b), NaN where a matrix is not positive definite; and int32 numbers as `spd_inverse`
        returns them.

    Raises:
        RuntimeError: shapes do not fit; from a native kernel also for another dtype or layout.
    """
    if matrices_KBB.shape[-1] > NATIVE_ROWS:
        return _spd_solve(matrices_KBB, x_KB)
    return operators_for(matrices_KBB).spd_solve(matrices_KBB, x_KB)


def _add_gram(sums_KBP: Tensor, grads_ND: Tensor, block_size: int, start: int) -> None:
    blocks, height, width = sums_KBP.shape
    if (blocks, start + height) != (-(-grads_ND.shape[1] // block_size), block_size) or width > height:
        raise RuntimeError(
            f"sums {tuple(sums_KBP.shape)} do not fit blocks of {block_size} in {grads_ND.shape[1]} columns"
        )
    at_once = max(1, COPY_BYTES // max(1, len(grads_ND) * block_size * 8))
    for first in range(0, blocks, at_once):
        grads_KNB = blocks_of(grads_ND, block_size, first, min(first + at_once, blocks))
        sums_KBP[first : first + at_once].baddbmm_(grads_KNB[:, :, start:].mT, grads_KNB[:, :, start : start + width])


def _spd_inverse(matrices_KBB: Tensor) -> tuple[Tensor, Tensor]:
    factor_KBB, info_K = torch.linalg.cholesky_ex(matrices_KBB)
    identity_BB = torch.eye(matrices_KBB.shape[-1], dtype=matrices_KBB.dtype, device=matrices_KBB.device)
    root_KBB = torch.linalg.solve_triangular(factor_KBB, identity_BB.expand_as(factor_KBB), upper=False)
    inverse_KBB = torch.bmm(root_KBB.mT, root_KBB)
    return inverse_KBB.masked_fill_((info_K != 0)[:, None, None], torch.nan), info_K


def _spd_solve(matrices_KBB: Tensor, x_KB: Tensor) -> tuple[Tensor, Tensor]:
    factor_KBB, info_K = torch.linalg.cholesky_ex(matrices_KBB)
    solution_KB = torch.cholesky_solve(x_KB.unsqueeze(2), factor_KBB).squeeze(2)
    return solution_KB.masked_fill((info_K != 0)[:, None], torch.nan), info_K


def _add_gram_fake(sums_KBP: Tensor, grads_ND: Tensor, block_size: int, start: int) -> None:
    return None


def _spd_inverse_fake(matrices_KBB: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(matrices_KBB), matrices_KBB.new_empty(matrices_KBB.shape[0], dtype=torch.int32)


def _spd_solve_fake(matrices_KBB: Tensor, x_KB: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_KB), matrices_KBB.new_empty(matrices_KBB.shape[0], dtype=torch.int32)


register("add_gram(Tensor(a!) sums_KBP, Tensor grads_ND, int block_size, int start) -> ()", _add_gram, _add_gram_fake)
register("spd_inverse(Tensor matrices_KBB) -> (Tensor, Tensor)", _spd_inverse, _spd_inverse_fake)
register("spd_solve(Tensor matrices_KBB, Tensor x_KB) -> (Tensor, Tensor)", _spd_solve, _spd_solve_fake)
