"""Products with row-sparse gradients, which are stored by their non-zero table rows, as dispatcher operators.

A gradient of a table with v rows of width h has n slots, each with a row number and the h values of that row; empty
slots hold the number v. A table of places, shape (v + 1,), gives for each row number its place among the rows of the
other operand, or -1: so two gradients meet in the rows that both have, and neither needs an order. The PyTorch
implementations below answer where no native kernel is registered (`mfac_hf.ops.registry`).

Shape suffixes: M gradients, N slots, H width of a row, V rows of the table, U rows of the other operand, E slots that
have a place.
"""

import warnings

import torch
from torch import Tensor

from mfac_hf.ops.registry import operators_for, register

__all__ = ["places", "sparse_combine", "sparse_dots"]


def places(rows_U: Tensor, height: int) -> Tensor:
    """Return the place of each table row among ``rows_U``, shape (v + 1,) for v = ``height``.

    It is -1 for the other rows, and for the number v of an empty slot.
    """
    place_V = rows_U.new_full((height + 1,), -1)
    place_V[rows_U] = torch.arange(len(rows_U), device=rows_U.device)
    return place_V


def sparse_dots(rows_MN: Tensor, values_MNH: Tensor, place_V: Tensor, x_UH: Tensor) -> Tensor:
    """Compute the dot product of every stored gradient with a vector that is zero outside some table rows.

    Args:
        rows_MN: row numbers in [0, v], int64; a gradient has each but v at most once.
        values_MNH: their values, float32 or float64.
        place_V: the row of ``x_UH`` that belongs to a table row, or -1; see `places`.
        x_UH: rows of the vector, float32 or float64.

    Returns:
        Shape (m,), float64. Products within a row are added up in the wider dtype of both, rows in float64.

    Raises:
        IndexError: a row number is out of range; a native kernel raises RuntimeError, also for a place out of range.
        RuntimeError: shapes do not fit.
    """
    return operators_for(values_MNH).sparse_dots(rows_MN, values_MNH, place_V, x_UH)


def sparse_combine(rows_MN: Tensor, values_MNH: Tensor, place_V: Tensor, weights_M: Tensor, count: int) -> Tensor:
    """Compute the ``count`` rows that have a place of a linear combination of the stored gradients.

    Each call gives the same bits.

    Args:
        rows_MN: row numbers in [0, v], int64; a gradient has each but v at most once.
        values_MNH: their values, float32 or float64.
        place_V: the row of the result that belongs to a table row, or -1; see `places`.
        weights_M: coefficients, float32 or float64.
        count: rows of the result, u.

    Returns:
        Shape (u, h), in the wider dtype of values and weights, which is that of the arithmetic.

    Raises:
        IndexError, RuntimeError: as for `sparse_dots`.
    """
    return operators_for(values_MNH).sparse_combine(rows_MN, values_MNH, place_V, weights_M, count)


def _sparse_dots(rows_MN: Tensor, values_MNH: Tensor, place_V: Tensor, x_UH: Tensor) -> Tensor:
    """Multiply only the slots that have a place: a sampled matrix product in CSR form, with a row for each slot."""
    place_S = place_V[rows_MN].flatten()
    found_S = place_S >= 0
    slots_E = found_S.nonzero().squeeze(1)
    values_SH = values_MNH.reshape(-1, values_MNH.shape[2])
    if x_UH.dtype != values_SH.dtype:
        wide = torch.promote_types(x_UH.dtype, values_SH.dtype)
        products_E = torch.linalg.vecdot(values_SH[slots_E].to(wide), x_UH.to(wide)[place_S[slots_E]])
    else:
        with warnings.catch_warnings():  # CSR tensors announce themselves as beta
            warnings.simplefilter("ignore")
            pattern = torch.sparse_csr_tensor(
                torch.cat([found_S.new_zeros(1, dtype=torch.int64), found_S.cumsum(0)]),
                place_S[slots_E],
                x_UH.new_zeros(len(slots_E)),
                size=(len(values_SH), len(x_UH)),
                check_invariants=False,
            )
            products_E = torch.sparse.sampled_addmm(pattern, values_SH, x_UH.t(), beta=0.0).values()
    products_S = torch.zeros(len(place_S), dtype=torch.float64, device=place_S.device)
    products_S[slots_E] = products_E.double()
    return products_S.view(rows_MN.shape).sum(dim=1)


def _sparse_combine(rows_MN: Tensor, values_MNH: Tensor, place_V: Tensor, weights_M: Tensor, count: int) -> Tensor:
    """Sort the slots by their place, then add up each run: no atomics, and no order that threads decide."""
    values_SH = values_MNH.reshape(-1, values_MNH.shape[2])
    wide = torch.promote_types(values_SH.dtype, weights_M.dtype)
    place_S, order_S = torch.sort(place_V[rows_MN].flatten(), stable=True)
    first = int(torch.searchsorted(place_S, 0))
    if first == len(place_S):
        return values_SH.new_zeros(count, values_SH.shape[1], dtype=wide)
    bounds_U = torch.searchsorted(place_S[first:], torch.arange(count, device=place_S.device))
    slots_E = order_S[first:]
    return torch.nn.functional.embedding_bag(
        slots_E,
        values_SH.to(wide),
        bounds_U,
        mode="sum",
        per_sample_weights=weights_M.to(wide)[slots_E // rows_MN.shape[1]],
    )


def _sparse_dots_fake(rows_MN: Tensor, values_MNH: Tensor, place_V: Tensor, x_UH: Tensor) -> Tensor:
    return values_MNH.new_empty(values_MNH.shape[0], dtype=torch.float64)


def _sparse_combine_fake(
    rows_MN: Tensor, values_MNH: Tensor, place_V: Tensor, weights_M: Tensor, count: int
) -> Tensor:
    dtype = torch.promote_types(values_MNH.dtype, weights_M.dtype)
    return values_MNH.new_empty(count, values_MNH.shape[2], dtype=dtype)


register(
    "sparse_dots(Tensor rows_MN, Tensor values_MNH, Tensor place_V, Tensor x_UH) -> Tensor",
    _sparse_dots,
    _sparse_dots_fake,
)
register(
    "sparse_combine(Tensor rows_MN, Tensor values_MNH, Tensor place_V, Tensor weights_M, SymInt count) -> Tensor",
    _sparse_combine,
    _sparse_combine_fake,
)
