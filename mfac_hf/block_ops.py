"""Inverses and solutions for batches of small symmetric positive definite matrices, as dispatcher operators.

PyTorch's batched float64 Cholesky calls LAPACK once for each matrix, which is slow where matrices have a few dozen
rows. As in `mfac_hf.ops`, Python owns the schemas and the PyTorch implementation, and a native library registers a
kernel under the same name.

Shape suffixes: K matrices, B their rows.
"""

import torch
from torch import Tensor

from mfac_hf.build import load_native
from mfac_hf.ops import library

__all__ = ["spd_inverse", "spd_solve"]

# The native kernels hold a matrix in a core's own cache, and PyTorch's threads and blocks within one pay beyond.
NATIVE_ROWS = 512

library.define("spd_inverse(Tensor matrices_KBB) -> (Tensor, Tensor)")
library.define("spd_solve(Tensor matrices_KBB, Tensor x_KB) -> (Tensor, Tensor)")


def spd_inverse(matrices_KBB: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of each matrix by its Cholesky factor.

    Args:
        matrices_KBB: symmetric matrices, float64, contiguous.

    Returns:
        The inverses (k, b, b), NaN where a matrix is not positive definite; and int32 (k,), 0 where it is, else the
        number of the first leading minor that is not.

    Raises:
        RuntimeError: if the matrices are not square, or by a native kernel for another dtype or layout.
    """
    if matrices_KBB.shape[-1] > NATIVE_ROWS:
        return _spd_inverse(matrices_KBB)
    if not torch.compiler.is_compiling():
        load_native(matrices_KBB.device.type)
    return torch.ops.mfac.spd_inverse(matrices_KBB)


def spd_solve(matrices_KBB: Tensor, x_KB: Tensor) -> tuple[Tensor, Tensor]:
    """Solution of each system with a positive definite matrix, by forward and back substitution.

    Args:
        matrices_KBB: symmetric matrices, float64, contiguous.
        x_KB: one right-hand side for each, float64, contiguous.

    Returns:
        The solutions (k, b), NaN where a matrix is not positive definite; and int32 (k,) as from `spd_inverse`.

    Raises:
        RuntimeError: if shapes do not fit, or by a native kernel for another dtype or layout.
    """
    if matrices_KBB.shape[-1] > NATIVE_ROWS:
        return _spd_solve(matrices_KBB, x_KB)
    if not torch.compiler.is_compiling():
        load_native(matrices_KBB.device.type)
    return torch.ops.mfac.spd_solve(matrices_KBB, x_KB)


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


def _spd_inverse_fake(matrices_KBB: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(matrices_KBB), matrices_KBB.new_empty(matrices_KBB.shape[0], dtype=torch.int32)


def _spd_solve_fake(matrices_KBB: Tensor, x_KB: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_KB), matrices_KBB.new_empty(matrices_KBB.shape[0], dtype=torch.int32)


for _name, _implementation, _fake in (
    ("spd_inverse", _spd_inverse, _spd_inverse_fake),
    ("spd_solve", _spd_solve, _spd_solve_fake),
):
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mfac::{_name}", _fake, lib=library)
