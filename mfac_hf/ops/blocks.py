"""Sums, inverses and solutions of many small symmetric positive definite matrices, as dispatcher operators.

PyTorch's batched float64 Cholesky calls LAPACK once for each matrix, which is slow where matrices have a few dozen
rows, and its batched products know nothing of symmetry. So there are native kernels, and the PyTorch implementations
below answer where none is registered (`mfac_hf.ops.registry`).

Shape suffixes: K matrices, B their rows, T numbers on and below the diagonal, N, M gradients, D parameters, P rows at
once.
"""

import torch
from torch import Tensor

from mfac_hf.ops.registry import operators_for, register

__all__ = ["add_gram", "cholesky", "dual_inverse", "spd_inverse", "spd_solve", "triangle", "unpack_gram"]

# Rows of the largest matrices for the native kernels, which hold one in a core's own cache. Beyond, PyTorch is faster:
# its threads share a matrix.
NATIVE_ROWS = 512

# Rows of a block whose products PyTorch computes at once, with all columns up to the last one's diagonal.
PANEL = 64

# Bytes of the float64 copy that PyTorch multiplies at once: it should stay in a core's own cache.
COPY_BYTES = 1 << 20


def triangle(size: int) -> int:
    """Return how many numbers a symmetric matrix of ``size`` rows has on and below its diagonal.

    >>> triangle(3)
    6
    """
    return size * (size + 1) // 2


def add_gram(sums_KT: Tensor, grads_ND: Tensor, block_size: int) -> None:
    r"""Add :math:`G_b^\top G_b` for each block b, in float64.

    Args:
        sums_KT: the sums on and below the diagonal of each block, row after row; float64, contiguous.
        grads_ND: gradients as rows. :math:`G_b` has ``block_size`` consecutive columns of them, zeros beyond the end.
        block_size: columns of a block.

    Raises:
        RuntimeError: shapes do not fit; from a native kernel also for another dtype or layout.
    """
    if block_size > NATIVE_ROWS:
        return _add_gram(sums_KT, grads_ND, block_size)
    operators_for(grads_ND).add_gram(sums_KT, grads_ND, block_size)


def unpack_gram(
    sums_KT: Tensor, block_size: int, divisor: float, damping: float, keep_KB: Tensor | None = None
) -> Tensor:
    r"""Return :math:`\lambda I + S_b / n` for the sums :math:`S_b` of each block: shape (k, b, b), float64.

    Args:
        sums_KT: sums as `add_gram` makes them.
        block_size: rows of a block.
        divisor: n.
        damping: :math:`\lambda`.
        keep_KB: mask of coordinates; those that are not kept get the row and the column of the identity.

    Raises:
        RuntimeError: shapes do not fit; from a native kernel also for another dtype or layout.
    """
    if block_size > NATIVE_ROWS:
        return _unpack_gram(sums_KT, block_size, divisor, damping, keep_KB)
    return operators_for(sums_KT).unpack_gram(sums_KT, block_size, divisor, damping, keep_KB)


def blocks_of(grads_ND: Tensor, block_size: int, first: int, last: int) -> Tensor:
    """Copy the columns of blocks ``first`` to ``last`` to float64, shape (k, n, b), with zeros beyond the end."""
    columns_ND = grads_ND[:, first * block_size : last * block_size]
    missing = (last - first) * block_size - columns_ND.shape[1]
    if missing:
        columns_ND = torch.nn.functional.pad(columns_ND, (0, missing))
    grads_KNB = columns_ND.unflatten(1, (last - first, block_size)).transpose(0, 1)
    return grads_KNB.to(torch.float64, memory_format=torch.contiguous_format)


def dual_inverse(grads_MD: Tensor, block_size: int, shift: float, x_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Return the diagonal of :math:`P_b = I - G_b^\top (s I + G_b G_b^\top)^{-1} G_b`, or :math:`P_b x`, for all b.

    Args:
        grads_MD: gradients as rows, which are contiguous, float32 or float64; the columns of :math:`G_b` are
            ``block_size`` consecutive ones.
        block_size: columns of a block; the last one may be shorter.
        shift: s > 0.
        x_D: a float64 vector to multiply; None for the diagonal.

    Returns:
        The diagonal or the product, shape (d,), float64, NaN where a system is not positive definite; and for each
        block an int32 number, as `spd_inverse` returns them.

    Raises:
        RuntimeError: shapes do not fit; from a native kernel also for another dtype or layout.
    """
    if max(block_size, len(grads_MD)) > NATIVE_ROWS:
        return _dual_inverse(grads_MD, block_size, shift, x_D)
    return operators_for(grads_MD).dual_inverse(grads_MD, block_size, shift, x_D)


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


def _add_gram(sums_KT: Tensor, grads_ND: Tensor, block_size: int) -> None:
    blocks, length = sums_KT.shape
    if (blocks, length) != (-(-grads_ND.shape[1] // block_size), triangle(block_size)):
        raise RuntimeError(
            f"sums {tuple(sums_KT.shape)} do not fit blocks of {block_size} in {grads_ND.shape[1]} columns"
        )
    at_once = max(1, COPY_BYTES // max(1, len(grads_ND) * block_size * 8))
    for first in range(0, blocks, at_once):
        grads_KNB = blocks_of(grads_ND, block_size, first, min(first + at_once, blocks))
        for top in range(0, block_size, PANEL):
            last = min(top + PANEL, block_size)
            rows_KPB = torch.bmm(grads_KNB[:, :, top:last].mT, grads_KNB[:, :, :last])
            at_T = torch.tril_indices(last - top, last, top, device=sums_KT.device)
            sums_KT[first : first + at_once, triangle(top) : triangle(last)] += rows_KPB[:, at_T[0], at_T[1]]


def _unpack_gram(
    sums_KT: Tensor, block_size: int, divisor: float, damping: float, keep_KB: Tensor | None = None
) -> Tensor:
    if sums_KT.shape[1] != triangle(block_size):
        raise RuntimeError(f"sums of {sums_KT.shape[1]} numbers are no triangle of {block_size} rows")
    rows_B1 = torch.arange(block_size, device=sums_KT.device).unsqueeze(1)
    high_BB, low_BB = torch.maximum(rows_B1, rows_B1.T), torch.minimum(rows_B1, rows_B1.T)
    matrices_KBB = sums_KT[:, high_BB * (high_BB + 1) // 2 + low_BB].div_(divisor)
    added_KB = torch.full_like(matrices_KBB[:, 0], damping)
    if keep_KB is not None:
        matrices_KBB *= keep_KB.unsqueeze(1) * keep_KB.unsqueeze(2)
        added_KB = torch.where(keep_KB, added_KB, 1)
    matrices_KBB.diagonal(dim1=1, dim2=2).add_(added_KB)
    return matrices_KBB


def _dual_inverse(grads_MD: Tensor, block_size: int, shift: float, x_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    num_grads, dim = grads_MD.shape
    if x_D is not None and x_D.shape != (dim,):
        raise RuntimeError(f"vector of shape {tuple(x_D.shape)}; expected ({dim},)")
    blocks = -(-dim // block_size)
    at_once = max(1, COPY_BYTES // max(1, num_grads * block_size * 8))
    parts, infos = [grads_MD.new_empty(0, dtype=torch.float64)], [grads_MD.new_empty(0, dtype=torch.int32)]
    for first in range(0, blocks, at_once):
        last = min(first + at_once, blocks)
        grads_KMB = blocks_of(grads_MD, block_size, first, last)
        system_KMM = torch.bmm(grads_KMB, grads_KMB.mT)
        system_KMM.diagonal(dim1=1, dim2=2).add_(shift)
        factor_KMM, info_K = cholesky(system_KMM)
        if x_D is None:
            root_KMB = torch.linalg.solve_triangular(factor_KMM, grads_KMB, upper=False)
            part_KB = 1 - root_KMB.square().sum(dim=1)
        else:
            x_KB1 = blocks_of(x_D.unsqueeze(0), block_size, first, last).mT
            weights_KM1 = torch.cholesky_solve(torch.bmm(grads_KMB, x_KB1), factor_KMM)
            part_KB = (x_KB1 - torch.bmm(grads_KMB.mT, weights_KM1)).squeeze(2)
        parts.append(part_KB.masked_fill((info_K != 0).unsqueeze(1), torch.nan).flatten())
        infos.append(info_K)
    return torch.cat(parts)[:dim], torch.cat(infos)


def cholesky(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return lower factors, and where each one ended or 0: `torch.linalg.cholesky_ex` of one matrix or many.

    A matrix with NaN is not positive definite either, which LAPACK says, but cuSOLVER does not.
    """
    factor, info = torch.linalg.cholesky_ex(matrices)
    if matrices.device.type != "cpu":
        broken = ~factor.diagonal(dim1=-2, dim2=-1).isfinite().all(dim=-1)
        info = info.masked_fill((info == 0) & broken, matrices.shape[-1])
    return factor, info


def _spd_inverse(matrices_KBB: Tensor) -> tuple[Tensor, Tensor]:
    factor_KBB, info_K = cholesky(matrices_KBB)
    identity_BB = torch.eye(matrices_KBB.shape[-1], dtype=matrices_KBB.dtype, device=matrices_KBB.device)
    root_KBB = torch.linalg.solve_triangular(factor_KBB, identity_BB.expand_as(factor_KBB), upper=False)
    inverse_KBB = torch.bmm(root_KBB.mT, root_KBB)
    return inverse_KBB.masked_fill_((info_K != 0)[:, None, None], torch.nan), info_K


def _spd_solve(matrices_KBB: Tensor, x_KB: Tensor) -> tuple[Tensor, Tensor]:
    factor_KBB, info_K = cholesky(matrices_KBB)
    solution_KB = torch.cholesky_solve(x_KB.unsqueeze(2), factor_KBB).squeeze(2)
    return solution_KB.masked_fill((info_K != 0)[:, None], torch.nan), info_K


def _add_gram_fake(sums_KT: Tensor, grads_ND: Tensor, block_size: int) -> None:
    return None


def _unpack_gram_fake(
    sums_KT: Tensor, block_size: int, divisor: float, damping: float, keep_KB: Tensor | None = None
) -> Tensor:
    return sums_KT.new_empty(sums_KT.shape[0], block_size, block_size)


def _dual_inverse_fake(
    grads_MD: Tensor, block_size: int, shift: float, x_D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    blocks = -(-grads_MD.shape[1] // block_size)
    return (
        grads_MD.new_empty(grads_MD.shape[1], dtype=torch.float64),
        grads_MD.new_empty(blocks, dtype=torch.int32),
    )


def _spd_inverse_fake(matrices_KBB: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(matrices_KBB), matrices_KBB.new_empty(matrices_KBB.shape[0], dtype=torch.int32)


def _spd_solve_fake(matrices_KBB: Tensor, x_KB: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_KB), matrices_KBB.new_empty(matrices_KBB.shape[0], dtype=torch.int32)


register("add_gram(Tensor(a!) sums_KT, Tensor grads_ND, int block_size) -> ()", _add_gram, _add_gram_fake)
register(
    "unpack_gram(Tensor sums_KT, int block_size, float divisor, float damping, Tensor? keep_KB=None) -> Tensor",
    _unpack_gram,
    _unpack_gram_fake,
)
register(
    "dual_inverse(Tensor grads_MD, int block_size, float shift, Tensor? x_D=None) -> (Tensor, Tensor)",
    _dual_inverse,
    _dual_inverse_fake,
)
register("spd_inverse(Tensor matrices_KBB) -> (Tensor, Tensor)", _spd_inverse, _spd_inverse_fake)
register("spd_solve(Tensor matrices_KBB, Tensor x_KB) -> (Tensor, Tensor)", _spd_solve, _spd_solve_fake)
