"""Storage of the gradient window: dense columns, and the exact row-sparse columns of embeddings.

The window G is an M x D matrix with one stored gradient a row. Its columns (the parameters) are divided among stores.
The dynamic algorithm makes two passes over G: ``dots``, whose results are added up over the stores, and ``combine``,
whose results are put side by side. So each store may sit on its own device and choose its own format.

The gradient of an embedding table is zero outside the rows that the batch looked up (1-5 % of them).
`RowSparseColumns` holds just those rows, which loses nothing: two gradients meet only in the rows that both have.

What a gradient has in one store is its *part* there: a vector in dense columns, `SparseRows` in row-sparse ones.

Shape suffixes: M stored gradients, D parameters of the store, V rows of the table, H width of a row, N slots for rows
per gradient, U distinct rows in the window.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mfac_hf.fisher.dense import DenseColumns, widened
from mfac_hf.ops.rows import places, sparse_combine, sparse_dots

__all__ = ["ColumnStore", "DenseColumns", "Part", "RowSparseColumns", "SparseRows", "widened"]


class SparseRows(NamedTuple):
    """A (v, h) table that is zero outside some of its rows.

    >>> SparseRows(torch.tensor([2]), torch.tensor([[5.0, 6.0]])).to_dense((3, 2))
    tensor([[0., 0.],
            [0., 0.],
            [5., 6.]])

    Attributes:
        rows: numbers of the rows, (n,), int64, strictly ascending.
        values: these rows, (n, h).
    """

    rows: Tensor
    values: Tensor

    def to(self, device: torch.device) -> "SparseRows":
        """The same on another device."""
        return SparseRows(self.rows.to(device), self.values.to(device))

    def to_dense(self, shape: torch.Size | tuple[int, int]) -> Tensor:
        """The whole table, (v, h)."""
        return self.values.new_zeros(shape).index_copy_(0, self.rows, self.values)


Part = Tensor | SparseRows


class ColumnStore(Protocol):
    """Some columns of the window: one part of each stored gradient.

    Products are those with the parts as they are stored, after rounding. Rows are written before they are read.
    """

    @property
    def dim(self) -> int:
        """Columns of this store, d."""

    @property
    def device(self) -> torch.device:
        """Device of the buffers."""

    @property
    def compute_device(self) -> torch.device:
        """Device of products with the stored gradients."""

    @property
    def result_dtype(self) -> torch.dtype:
        """Type of products with the stored gradients."""

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""

    def write(self, row: int, part: Any) -> None:
        """Store a part as row ``row``."""

    def clear(self, rows: slice) -> None:
        """Store zeros in these rows."""

    def join(self, parts: Sequence[Any]) -> Any:
        """The part of the whole store, from those of the parameters that share it."""

    def dots(self, row: int, count: int) -> Tensor:
        """Dot products of the stored row ``row`` with the first ``count`` rows; (count,), float64."""

    def project(self, x_D: Tensor, count: int) -> Tensor:
        """Dot products of any vector with the first ``count`` rows; (count,), float64."""

    def gram(self, count: int) -> Tensor:
        """All dot products among the first ``count`` rows; (count, count), float64."""

    def combine(self, weights_M: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Combination of the first ``len(weights_M)`` rows as a vector, (d,); in float64 where ``dtype`` says so."""

    def combine_part(self, weights_M: Tensor, *, dtype: torch.dtype | None = None) -> Any:
        """The same as a part."""


class RowSparseColumns:
    """Columns of a (v, h) table whose gradients have few non-zero rows, stored exactly.

    Each gradient has the same number of slots for rows, which grows when a gradient needs more.

    Args:
        num_grads: rows of the window, m.
        shape: (v, h) of the table.
        dtype: storage type of the values, float32 or float64.
        device: of the buffers.
        slots: non-zero rows to make room for in each gradient.
        buffers: existing row numbers (m, n) and values (m, n, h) to use in place of new ones.
    """

    def __init__(
        self,
        num_grads: int,
        shape: tuple[int, int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        slots: int = 1,
        buffers: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.shape = shape
        self.dim = shape[0] * shape[1]
        # Empty slots hold the row number v: it sorts behind every real row.
        self.rows_MN, self.values_MNH = buffers or (
            torch.full((num_grads, slots), shape[0], dtype=torch.int64, device=device),
            torch.zeros(num_grads, slots, shape[1], dtype=dtype, device=device),
        )

    @property
    def device(self) -> torch.device:
        """Device of the buffers."""
        return self.values_MNH.device

    @property
    def compute_device(self) -> torch.device:
        """Device of products: that of the buffers."""
        return self.device

    @property
    def result_dtype(self) -> torch.dtype:
        """Type of products with the stored gradients: that of the values."""
        return self.values_MNH.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self.values_MNH.nbytes + self.rows_MN.nbytes

    def write(self, row: int, part: SparseRows) -> None:
        """Store some rows of the table as row ``row`` of the window."""
        rows, values = part
        if len(rows) > self.rows_MN.shape[1]:
            self._grow(len(rows))
        self.rows_MN[row].fill_(self.shape[0])
        self.rows_MN[row, : len(rows)] = rows.to(self.device)
        self.values_MNH[row, : len(rows)] = values.to(self.device)

    def clear(self, rows: slice) -> None:
        """Store zeros in these rows: no row of the table."""
        self.rows_MN[rows] = self.shape[0]

    def join(self, parts: Sequence[SparseRows]) -> SparseRows:
        """The part of the one parameter that such a store belongs to."""
        (part,) = parts
        return part

    def _grow(self, needed: int) -> None:
        num_grads, slots = self.rows_MN.shape
        extra = max(needed, slots * 5 // 4) - slots
        self.rows_MN = torch.cat([self.rows_MN, self.rows_MN.new_full((num_grads, extra), self.shape[0])], dim=1)
        self.values_MNH = torch.cat(
            [self.values_MNH, self.values_MNH.new_zeros(num_grads, extra, self.shape[1])], dim=1
        )

    def _rows(self, count: int) -> Tensor:
        """Distinct table rows of the first ``count`` gradients, ascending; (U,)."""
        found_V = torch.zeros(self.shape[0] + 1, dtype=torch.bool, device=self.device)
        found_V[self.rows_MN[:count].flatten()] = True
        return found_V[:-1].nonzero().squeeze(1)

    def dots(self, row: int, count: int) -> Tensor:
        """Dot products of the stored row ``row`` with the first ``count`` rows; float64."""
        used = int((self.rows_MN[row] < self.shape[0]).sum())
        return self._dots(self.rows_MN[row, :used], self.values_MNH[row, :used], count)

    def project(self, x_D: Tensor, count: int) -> Tensor:
        """Dot products of any vector of v * h numbers with the first ``count`` rows; float64."""
        rows_U = self._rows(count)
        return self._dots(rows_U, x_D.view(self.shape)[rows_U.to(x_D.device)].to(self.device), count)

    def gram(self, count: int) -> Tensor:
        """All dot products among the first ``count`` rows, (count, count); float64."""
        empty = torch.zeros(0, count, dtype=torch.float64, device=self.device)
        return torch.cat([empty, *(self.dots(row, count).unsqueeze(0) for row in range(count))])

    def row(self, row: int) -> Tensor:
        """The stored row ``row`` as a dense vector, shape (v * h,)."""
        used = self.rows_MN[row] < self.shape[0]
        return SparseRows(self.rows_MN[row, used], self.values_MNH[row, used]).to_dense(self.shape).flatten()

    def keep_only(self, keep_VH: Tensor) -> None:
        """Zero the stored numbers of the table's masked positions."""
        padded = torch.cat([keep_VH, keep_VH.new_zeros(1, keep_VH.shape[1])]).to(self.device)  # for empty slots
        for rows, values in zip(self.rows_MN, self.values_MNH, strict=True):
            values.mul_(padded[rows])

    def _dots(self, rows_U: Tensor, x_UH: Tensor, count: int) -> Tensor:
        place_V = places(rows_U, self.shape[0])
        return sparse_dots(self.rows_MN[:count], self.values_MNH[:count], place_V, x_UH)

    def combine_part(self, weights_M: Tensor, *, dtype: torch.dtype | None = None) -> SparseRows:
        """Combination of the first ``len(weights_M)`` rows, with the u table rows that any of them has."""
        count = len(weights_M)
        rows_U = self._rows(count)
        weights_M = weights_M.to(self.device, dtype or self.values_MNH.dtype)
        place_V = places(rows_U, self.shape[0])
        values_UH = sparse_combine(self.rows_MN[:count], self.values_MNH[:count], place_V, weights_M, len(rows_U))
        return SparseRows(rows_U, values_UH)

    def combine(self, weights_M: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Combination of the first ``len(weights_M)`` rows as a vector, (v * h,)."""
        return self.combine_part(weights_M, dtype=dtype).to_dense(self.shape).flatten()
