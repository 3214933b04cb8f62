"""The two passes over the gradient window, as dispatcher operators.

``torch.ops.mfac.row_dots`` and ``torch.ops.mfac.combine`` are all that the dynamic algorithm does with the m x d
window. The PyTorch implementations below answer where no native kernel is registered (`mfac_hf.ops.registry`).

Shape suffixes: M stored gradients, D parameters.
"""

import torch
from torch import Tensor

from mfac_hf.ops.registry import operators_for, register

__all__ = ["combine", "row_dots"]

# A float32 dot product is accumulated over at most this many columns before it is added in float64. Over 16,384
# columns the Gram diagonal was seen to be off by 3e-7 of its value, and two equal rows had dot products 6e-8 apart
# over 8,192: the smaller the damping, the more that matters.
RUN_LENGTH = 2048

# Elements widened at once where storage and arithmetic differ (bfloat16 windows): 4 MiB of float32, small enough for a
# cache.
WIDEN_ELEMENTS = 1 << 20


def row_dots(grads_MD: Tensor, x_D: Tensor) -> Tensor:
    r"""Compute the dot product of every stored gradient with one vector, :math:`G x`.

    Args:
        grads_MD: window of shape (m, d) in float32, bfloat16 or float64; rows may be strided, columns are contiguous.
        x_D: vector of shape (d,) in float32 or float64. Products are computed in float32 or wider.

    Returns:
        Shape (m,), float64: sums over short runs of columns in the products' dtype, added up in float64.

    Raises:
        ValueError: a shape is wrong; a native kernel raises RuntimeError.
    """
    return operators_for(grads_MD).row_dots(grads_MD, x_D)


def combine(
    grads_MD: Tensor, weights_M: Tensor, x_D: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    r"""Compute a linear combination of the stored gradients, :math:`\alpha x + \beta\, G^\top w`.

    Args:
        grads_MD: window of shape (m, d) in float32, bfloat16 or float64.
        weights_M: coefficients of shape (m,), float64.
        x_D: optional vector of shape (d,) in float32 or float64; float64 asks for float64 arithmetic.
        alpha: factor of ``x_D``.
        beta: factor of the combination.

    Returns:
        Shape (d,), float32, or float64 where the window or ``x_D`` is float64.

    Raises:
        ValueError: a shape is wrong; a native kernel raises RuntimeError.
    """
    return operators_for(grads_MD).combine(grads_MD, weights_M, x_D, alpha, beta)


def _compute_dtype(grads_MD: Tensor, x_D: Tensor | None) -> torch.dtype:
    wide = grads_MD.dtype == torch.float64 or (x_D is not None and x_D.dtype == torch.float64)
    return torch.float64 if wide else torch.float32


def _column_chunk(grads_MD: Tensor, dtype: torch.dtype) -> int:
    """Return how many columns to take at once; where the window has to be widened, memory bounds them."""
    if grads_MD.dtype == dtype:
        return RUN_LENGTH if dtype == torch.float32 else max(grads_MD.shape[1], 1)
    return max(256, WIDEN_ELEMENTS // max(grads_MD.shape[0], 1))


def _check_vector(vector: Tensor, expected: int, name: str, of_window: str) -> None:
    # Without this check the tail of a vector that is too long would be ignored where the window ends with a chunk of
    # columns, and a single number would be broadcast to all columns.
    if vector.shape != (expected,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; the window has {expected} {of_window}")


def _row_dots(grads_MD: Tensor, x_D: Tensor) -> Tensor:
    _check_vector(x_D, grads_MD.shape[1], "x", "columns")
    # Squares of bfloat16 numbers round in one direction in float32 (k * k is 0, 1 or 4 modulo 8), up to 1e-5 of a long
    # sum; widening to float64 costs the same as widening to float32.
    dtype = torch.float64 if grads_MD.dtype == torch.bfloat16 else _compute_dtype(grads_MD, x_D)
    x_D = x_D.to(dtype)
    chunk = _column_chunk(grads_MD, dtype)
    dots_M = torch.zeros(grads_MD.shape[0], dtype=torch.float64, device=grads_MD.device)
    for start in range(0, grads_MD.shape[1], chunk):
        columns = slice(start, start + chunk)
        dots_M += torch.mv(grads_MD[:, columns].to(dtype), x_D[columns])
    return dots_M


# The dispatcher leaves out arguments that equal the schema's defaults, so the implementations repeat them.
def _combine(
    grads_MD: Tensor, weights_M: Tensor, x_D: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    _check_vector(weights_M, grads_MD.shape[0], "weights", "rows")
    if x_D is not None:
        _check_vector(x_D, grads_MD.shape[1], "x", "columns")
    dtype = _compute_dtype(grads_MD, x_D)
    weights_M = (beta * weights_M).to(dtype)
    if grads_MD.dtype == dtype:
        out_D = torch.mv(grads_MD.t(), weights_M)
    else:
        out_D = torch.empty(grads_MD.shape[1], dtype=dtype, device=grads_MD.device)
        chunk = _column_chunk(grads_MD, dtype)
        for start in range(0, grads_MD.shape[1], chunk):
            columns = slice(start, start + chunk)
            torch.mv(grads_MD[:, columns].to(dtype).t(), weights_M, out=out_D[columns])
    return out_D if x_D is None else out_D.add_(x_D, alpha=alpha)


def _row_dots_fake(grads_MD: Tensor, x_D: Tensor) -> Tensor:
    return grads_MD.new_empty(grads_MD.shape[0], dtype=torch.float64)


def _combine_fake(
    grads_MD: Tensor, weights_M: Tensor, x_D: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    return grads_MD.new_empty(grads_MD.shape[1], dtype=_compute_dtype(grads_MD, x_D))


register("row_dots(Tensor grads_MD, Tensor x_D) -> Tensor", _row_dots, _row_dots_fake)
register(
    "combine(Tensor grads_MD, Tensor weights_M, Tensor? x_D=None, float alpha=1.0, float beta=1.0) -> Tensor",
    _combine,
    _combine_fake,
)
