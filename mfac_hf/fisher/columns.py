"""Where the gradient window keeps its numbers: dense columns, and the exact row-sparse columns of embeddings.

The window G is an M x D matrix, one stored gradient a row. Its columns (the parameters) are dealt out to one or more
stores. The two passes over G that the dynamic algorithm makes are sums (``dots``) or concatenations (``combine``) over
stores, so a store may sit on any device and choose its own format.

The gradient of an embedding table is zero outside the rows that the batch looked up (1-5 % of them).
`RowSparseColumns` holds just those rows, which loses nothing: two gradients meet only in the rows that both have.

Shape suffixes: M stored gradients, D parameters of the store, V rows of the table, H width of a row, N slots for rows
per gradient, U distinct rows in the window, E entries (pairs of gradient and row).
"""

import warnings

import torch
from torch import Tensor

from mfac_hf import ops

__all__ = ["DenseColumns", "RowSparseColumns"]

GRAM_ELEMENTS = 1 << 22  # numbers of the window widened to float64 at once: 32 MiB


class DenseColumns:
    """Columns kept as one (m, d) buffer.

    Args:
        num_grads: rows of the window, m.
        dim: columns of this store, d.
        dtype: storage type, float32, bfloat16 or float64.
        device: where the buffer lives.
        buffer: an existing buffer to use in place of a new one.
    """

    def __init__(
        self,
        num_grads: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        buffer: Tensor | None = None,
    ) -> None:
        self.dim = dim
        # Rows are written before they are read, so nothing has to be initialised (and no page of memory is touched).
        self.buffer_MD = torch.empty(num_grads, dim, dtype=dtype, device=device) if buffer is None else buffer

    @property
    def device(self) -> torch.device:
        """Device of the buffer."""
        return self.buffer_MD.device

    @property
    def result_dtype(self) -> torch.dtype:
        """What products with the stored gradients are returned in: float64 for float64 storage, else float32."""
        return torch.float64 if self.buffer_MD.dtype == torch.float64 else torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer_MD.nbytes

    def write(self, row: int, grad_D: Tensor) -> None:
        """Store a gradient of d numbers as row ``row``, rounded to the storage type."""
        self.buffer_MD[row].copy_(grad_D)

    def dots(self, row: int, count: int) -> Tensor:
        """Dot products of the stored row ``row`` with the first ``count`` rows; float64."""
        return ops.row_dots(self.buffer_MD[:count], _widened(self.buffer_MD[row]))

    def project(self, x_D: Tensor, count: int) -> Tensor:
        """Dot products of any vector with the first ``count`` rows; float64."""
        return ops.row_dots(self.buffer_MD[:count], x_D.to(self.device))

    def gram(self, count: int) -> Tensor:
        """All dot products among the first ``count`` rows, (count, count); float64."""
        gram_MM = torch.zeros(count, count, dtype=torch.float64, device=self.device)
        chunk = max(1, GRAM_ELEMENTS // max(count, 1))
        for start in range(0, self.dim, chunk):
            part = self.buffer_MD[:count, start : start + chunk].double()
            gram_MM.addmm_(part, part.t())
        return gram_MM

    def select(self, positions: Tensor, count: int) -> "DenseColumns":
        """A store of the columns at these positions alone, with the first ``count`` rows filled."""
        selected = DenseColumns(len(self.buffer_MD), len(positions), dtype=self.buffer_MD.dtype, device=self.device)
        for row in range(count):
            torch.index_select(self.buffer_MD[row], 0, positions, out=selected.buffer_MD[row])
        return selected

    def combine(self, weights_M: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Combination of the first ``len(weights_M)`` rows, shape (d,); float64 arithmetic where ``dtype`` says so."""
        x_D = None
        if dtype == torch.float64 and self.buffer_MD.dtype != torch.float64:
            x_D = torch.zeros(self.dim, dtype=dtype, device=self.device)
        return ops.combine(self.buffer_MD[: len(weights_M)], weights_M.to(self.device), x_D)


class RowSparseColumns:
    """Columns of a (v, h) table whose gradients have few non-zero rows, stored exactly.

    Each gradient has the same number of slots, which grows when a gradient needs more. Values are float32 also in a
    bfloat16 window (they are the small part of it), float64 in a float64 one.

    Args:
        num_grads: rows of the window, m.
        shape: (v, h) of the table.
        dtype: storage type of the values, float32 or float64.
        device: where the buffers live.
        slots: non-zero rows to make room for in each gradient.
    """

    def __init__(
        self,
        num_grads: int,
        shape: tuple[int, int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        slots: int = 1,
    ) -> None:
        self.shape = shape
        self.dim = shape[0] * shape[1]
        # Empty slots hold the row number v: it sorts behind every real row.
        self.rows_MN = torch.full((num_grads, slots), shape[0], dtype=torch.int64, device=device)
        self.values_MNH = torch.zeros(num_grads, slots, shape[1], dtype=dtype, device=device)
        self._index: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._index_count = 0

    @property
    def device(self) -> torch.device:
        """Device of the buffers."""
        return self.values_MNH.device

    @property
    def result_dtype(self) -> torch.dtype:
        """What products with the stored gradients are returned in: the type of the values."""
        return self.values_MNH.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self.values_MNH.nbytes + self.rows_MN.nbytes

    def restore(self, rows_MN: Tensor, values_MNH: Tensor) -> None:
        """Use these buffers from now on."""
        self.rows_MN, self.values_MNH, self._index = rows_MN, values_MNH, None

    def write(self, row: int, grad: tuple[Tensor, Tensor]) -> None:
        """Store a gradient, as (row numbers (n,), values (n, h)), as row ``row``; the numbers ascend strictly."""
        rows, values = grad
        if len(rows) > self.rows_MN.shape[1]:
            self._grow(len(rows))
        self.rows_MN[row].fill_(self.shape[0])
        self.rows_MN[row, : len(rows)] = rows.to(self.device)
        self.values_MNH[row, : len(rows)] = values.to(self.device)
        self._index = None

    def _grow(self, needed: int) -> None:
        num_grads, slots = self.rows_MN.shape
        extra = max(needed, slots * 5 // 4) - slots
        self.rows_MN = torch.cat([self.rows_MN, self.rows_MN.new_full((num_grads, extra), self.shape[0])], dim=1)
        self.values_MNH = torch.cat(
            [self.values_MNH, self.values_MNH.new_zeros(num_grads, extra, self.shape[1])], dim=1
        )

    def _sorted(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Entries of the first ``count`` gradients sorted by table row.

        Returns the flat slots and the gradients of the entries (E,), the distinct rows (U,) and the bounds of their
        runs (U + 1,).
        """
        if self._index is None or self._index_count != count:
            rows_E, slots_E = torch.sort(self.rows_MN[:count].flatten(), stable=True)
            used = int(torch.searchsorted(rows_E, self.shape[0]))
            slots_E = slots_E[:used]
            rows_U, runs_U = torch.unique_consecutive(rows_E[:used], return_counts=True)
            bounds = torch.cat([runs_U.new_zeros(1), runs_U.cumsum(0)])
            self._index, self._index_count = (slots_E, slots_E // self.rows_MN.shape[1], rows_U, bounds), count
        return self._index

    def dots(self, row: int, count: int) -> Tensor:
        """Dot products of the stored row ``row`` with the first ``count`` rows; float64."""
        used = int((self.rows_MN[row] < self.shape[0]).sum())
        return self._sampled_dots(self.rows_MN[row, :used], self.values_MNH[row, :used], count)

    def project(self, x_D: Tensor, count: int) -> Tensor:
        """Dot products of any vector of v * h numbers with the first ``count`` rows; float64."""
        rows_U = self._sorted(count)[2]
        wide = torch.promote_types(x_D.dtype, self.values_MNH.dtype)
        x_UH = x_D.view(self.shape)[rows_U.to(x_D.device)].to(self.device, wide)
        return self._sampled_dots(rows_U, x_UH, count)

    def gram(self, count: int) -> Tensor:
        """All dot products among the first ``count`` rows, (count, count); float64."""
        empty = torch.zeros(0, count, dtype=torch.float64, device=self.device)
        return torch.cat([empty, *(self.dots(row, count).unsqueeze(0) for row in range(count))])

    def row(self, row: int) -> Tensor:
        """The stored row ``row`` as a dense vector, shape (v * h,)."""
        used = self.rows_MN[row] < self.shape[0]
        table_VH = self.values_MNH.new_zeros(self.shape)
        return table_VH.index_copy_(0, self.rows_MN[row, used], self.values_MNH[row, used]).flatten()

    def keep_only(self, keep_VH: Tensor) -> None:
        """Zero the stored numbers of the table's masked positions."""
        padded = torch.cat([keep_VH, keep_VH.new_zeros(1, keep_VH.shape[1])]).to(self.device)  # for empty slots
        for rows, values in zip(self.rows_MN, self.values_MNH, strict=True):
            values.mul_(padded[rows])

    def _sampled_dots(self, rows_N: Tensor, x_NH: Tensor, count: int) -> Tensor:
        """Dot products of the stored rows with the vector that is ``x_NH`` in table rows ``rows_N``, else zero.

        Only entries whose table row is among ``rows_N`` count: a sampled matrix product in CSR form whose row n lists
        the entries of table row ``rows_N[n]``, which are one run of the sorted order.
        """
        slots_E, owners_E, rows_U, bounds = self._sorted(count)
        place_N = torch.searchsorted(rows_U, rows_N)
        first_N, sizes_N = bounds[place_N], bounds[place_N + 1] - bounds[place_N]
        starts = torch.cat([sizes_N.new_zeros(1), sizes_N.cumsum(0)])
        entries = torch.repeat_interleave(first_N - starts[:-1], sizes_N) + torch.arange(
            int(starts[-1]), device=self.device
        )
        columns = slots_E[entries]
        values_EH = self.values_MNH.view(-1, self.shape[1])
        if x_NH.dtype != values_EH.dtype:
            products = torch.linalg.vecdot(
                values_EH[columns].to(x_NH.dtype), torch.repeat_interleave(x_NH, sizes_N, dim=0)
            )
        else:
            with warnings.catch_warnings():  # CSR tensors announce themselves as beta
                warnings.simplefilter("ignore")
                pattern = torch.sparse_csr_tensor(
                    starts,
                    columns,
                    x_NH.new_zeros(len(columns)),
                    size=(len(rows_N), len(values_EH)),
                    check_invariants=False,
                )
                products = torch.sparse.sampled_addmm(pattern, x_NH.contiguous(), values_EH.t(), beta=0.0).values()
        # A gradient has a table row at most once, so every cell is written once: no atomics, the same sum each time.
        table = torch.zeros(count, len(rows_N), dtype=torch.float64, device=self.device)
        table[owners_E[entries], torch.repeat_interleave(sizes_N)] = products.double()
        return table.sum(dim=1)

    def combine_rows(self, weights_M: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Combination of the first ``len(weights_M)`` rows: (distinct row numbers (u,), ascending; values (u, h))."""
        slots_E, owners_E, rows_U, bounds = self._sorted(len(weights_M))
        values_EH = self.values_MNH.view(-1, self.shape[1]).to(dtype or self.values_MNH.dtype)
        if len(slots_E) == 0:
            return rows_U, values_EH.new_zeros(0, self.shape[1])
        values_UH = torch.nn.functional.embedding_bag(
            slots_E, values_EH, bounds[:-1], mode="sum", per_sample_weights=weights_M.to(values_EH)[owners_E]
        )
        return rows_U, values_UH

    def combine(self, weights_M: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Combination of the first ``len(weights_M)`` rows as a dense vector, shape (v * h,)."""
        rows_U, values_UH = self.combine_rows(weights_M, dtype=dtype)
        return values_UH.new_zeros(self.shape).index_copy_(0, rows_U, values_UH).flatten()


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x
