"""The columns of the gradient window that belong to each parameter.

A parameter gets its columns when its first gradient arrives. So frozen and unused parameters cost nothing, and one
that is unfrozen late joins then, with zeros in the rows already stored, which is exact. Parameters placed together
share one dense store, so that each pass over the window is one product. A table whose gradients have few non-zero rows
gets a row-sparse store of its own, with values in float32 also in a bfloat16 window: they are its small part.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mfac_hf.fisher.columns import ColumnStore, DenseColumns, RowSparseColumns, SparseRows, widened
from mfac_hf.memory import ROW_SPARSE_MIN_NUMEL, require_memory
from mfac_hf.optim.options import ParameterWindowOptions

__all__ = [
    "DensePlacement",
    "Placement",
    "TablePlacement",
    "distinct_columns",
    "first_bytes",
    "is_row_sparse",
    "kept_positions",
    "place",
    "table_bytes",
]

# A parameter gets row-sparse columns if at most this share of the rows of its first gradient is non-zero ...
ROW_SPARSE_MAX_DENSITY = 0.25
# ... and dense ones when a later gradient exceeds this share: from about there dense is smaller and faster.
ROW_SPARSE_DENSIFY = 0.5


@dataclass(frozen=True)
class DensePlacement:
    """Columns of one parameter (of this rank's shard of it) among those of a dense store.

    Args:
        columns: the store, which other parameters share.
        shape: the parameter's.
        start: the first of its columns.
        size: how many it has.
        keep: flat positions in the parameter that its mask keeps, which alone have columns; None without a mask.
    """

    columns: DenseColumns
    shape: torch.Size
    start: int
    size: int
    keep: Tensor | None = None

    @property
    def _place(self) -> slice:
        return slice(self.start, self.start + self.size)

    def part(self, grad: Tensor | None, device: torch.device, mask: Tensor | None) -> Tensor:
        """The gradient as its columns store it, (size,); zeros for None."""
        if grad is None:
            return torch.zeros(self.size, device=device)
        flat = (grad.to_dense() if grad.is_sparse else grad).reshape(-1)
        return widened(flat if self.keep is None else flat[self.keep])

    def direction(self, combined_D: Tensor, device: torch.device) -> Tensor:
        """The parameter's direction, of its shape, from the store's; zero where it is masked."""
        return self._whole(combined_D[self._place].to(device)).view(self.shape)

    def stored(self, rows: Tensor) -> Tensor:
        """These stored gradients, (len(rows), numel), zero where they are masked."""
        return self._whole(self.columns.buffer_MD[rows.to(self.columns.device), self._place])

    def _whole(self, kept: Tensor) -> Tensor:
        """Numbers of all positions of the parameter along the last dimension, zero where they are masked."""
        if self.keep is None:
            return kept
        whole = kept.new_zeros(*kept.shape[:-1], self.shape.numel())
        return whole.index_copy_(-1, self.keep.to(kept.device), kept)

    def state(self) -> dict[str, Any]:
        """The window of this parameter for the optimizer's state: a view of the buffer, no copy."""
        view = self.columns.buffer_MD[:, self._place]
        return {"window": view if self.keep is not None else view.view(len(view), *self.shape)}


@dataclass(frozen=True)
class TablePlacement:
    """Columns of one parameter, a table, in a row-sparse store of its own.

    Args:
        columns: the store.
        shape: the parameter's.
    """

    columns: RowSparseColumns
    shape: torch.Size
    start: ClassVar[int] = 0

    @property
    def size(self) -> int:
        """Its columns: the numbers of the table."""
        return self.shape.numel()

    def part(self, grad: Tensor | None, device: torch.device, mask: Tensor | None) -> SparseRows:
        """The gradient as its columns store it, zero where it is masked; no row for None."""
        if grad is None:
            return SparseRows(torch.zeros(0, dtype=torch.int64), torch.zeros(0, self.shape[1]))
        rows, values = nonzero_rows(grad)
        return SparseRows(rows, values if mask is None else values * mask[rows])

    def outgrown_by(self, part: SparseRows) -> bool:
        """Whether so many rows of the gradient are non-zero that dense columns suit it better."""
        return len(part.rows) > ROW_SPARSE_DENSIFY * self.shape[0]

    def direction(self, combined: SparseRows, device: torch.device) -> SparseRows:
        """The parameter's direction, the rows of it that are not zero."""
        return combined.to(device)

    def stored(self, rows: Tensor) -> Tensor:
        """These stored gradients, (len(rows), numel), zero where they are masked."""
        return torch.stack([self.columns.row(row) for row in rows.tolist()])

    def state(self) -> dict[str, Any]:
        """The window of this parameter for the optimizer's state: the buffers, no copies."""
        return {"window_rows": self.columns.rows_MN, "window_values": self.columns.values_MNH}


Placement = DensePlacement | TablePlacement


def nonzero_rows(grad: Tensor) -> SparseRows:
    """Rows of a 2-d gradient, dense or sparse, that are not all zero."""
    if grad.is_sparse:
        grad = grad.coalesce()
        return SparseRows(grad.indices()[0], widened(grad.values()))
    # Faster than absolute values and as exact: a NaN is not zero either.
    rows = ((grad.amax(dim=1) != 0) | (grad.amin(dim=1) != 0)).nonzero().squeeze(1)
    return SparseRows(rows, widened(grad[rows]))


def place(
    gradients: dict[Tensor, Tensor],
    masks: dict[Tensor, Tensor],
    options: ParameterWindowOptions,
    devices: list[torch.device],
    *,
    row_sparse: Collection[Tensor] | None = None,
    gram_bytes: int = 0,
) -> dict[Tensor, Placement]:
    """Columns for parameters that have none yet, judged by their first gradients (a parameter's own, or its shard's).

    Args:
        gradients: by parameter.
        masks: {parameter: bool tensor of its shape, True = keep}, for those that have one.
        options: num_grads, window_dtype and row_sparse.
        devices: to deal the dense columns out to; tables go to the first.
        row_sparse: those that get row-sparse columns; None judges by these gradients (`is_row_sparse`).
        gram_bytes: what the first has to have room for beside them, as the Gram matrix comes next.

    Raises:
        MemoryError: if they do not fit, with the numbers; nothing is allocated then.
    """
    if row_sparse is None:
        row_sparse = {p for p, grad in gradients.items() if is_row_sparse(grad, options)}
    tables = {p: grad for p, grad in gradients.items() if p in row_sparse}
    keeps = {p: kept_positions(masks.get(p)) for p in gradients if p not in tables}
    sizes = {p: gradients[p].numel() if keep is None else len(keep) for p, keep in keeps.items()}
    slots = {p: max(1, min(g.shape[0], len(nonzero_rows(g).rows) * 5 // 4)) for p, g in tables.items()}
    of_tables = sum(table_bytes(tables[p].shape, n, options) for p, n in slots.items())
    dealt = _deal_out(sizes, devices)
    for device, members in dealt.items():
        beside = (of_tables, gram_bytes) if device == devices[0] else (0, 0)
        _require_room(sum(sizes[p] for p in members), *beside, device, options)

    placements: dict[Tensor, Placement] = {}
    for device, members in dealt.items():
        if not members:
            continue
        dim = sum(sizes[p] for p in members)
        columns = DenseColumns(
            options.num_grads,
            dim,
            dtype=options.window_dtype,
            device=device,
            compute_device=options.compute_device(gradients[members[0]].device),
        )
        start = 0
        for p in members:
            placements[p] = DensePlacement(columns, gradients[p].shape, start, sizes[p], keeps[p])
            start += sizes[p]
    for p, count in slots.items():
        height, width = tables[p].shape
        table = RowSparseColumns(
            options.num_grads, (height, width), dtype=options.result_dtype, device=devices[0], slots=count
        )
        placements[p] = TablePlacement(table, tables[p].shape)
    return placements


def _deal_out(sizes: dict[Tensor, int], devices: list[torch.device]) -> dict[torch.device, list[Tensor]]:
    """Parameters by device: largest first onto the least loaded, then within each device in the given order."""
    load = dict.fromkeys(devices, 0)
    chosen: dict[Tensor, torch.device] = {}
    for p in sorted(sizes, key=lambda p: -sizes[p]):
        chosen[p] = min(load, key=lambda device: load[device])
        load[chosen[p]] += sizes[p]
    return {device: [p for p in sizes if chosen[p] == device] for device in devices}


def first_bytes(grad: Tensor, mask: Tensor | None, options: ParameterWindowOptions) -> int:
    """Bytes of the columns of a parameter with this first gradient, its second moment included."""
    if is_row_sparse(grad, options):
        return table_bytes(grad.shape, len(nonzero_rows(grad).rows), options)
    return (grad.numel() if mask is None else int(mask.sum())) * options.column_bytes


def table_bytes(shape: Sequence[int], slots: int, options: ParameterWindowOptions) -> int:
    """Bytes of a table: ``slots`` rows of each gradient and their numbers, the second moment and its rows' steps."""
    height, width = shape
    rows = options.num_grads * slots * (width * options.result_dtype.itemsize + 8)
    return rows + (height * (width * options.moment_itemsize + 8) if options.moment_itemsize else 0)


def _require_room(
    dim: int, table_bytes: int, gram_bytes: int, device: torch.device, options: ParameterWindowOptions
) -> None:
    words = f"{options.num_grads} gradients x {dim:,} parameters in {options.window_dtype}"
    words += f" and {table_bytes >> 20} MiB of embedding rows" if table_bytes else ""
    words += f" and {gram_bytes >> 20} MiB for the Gram matrix and its factor" if gram_bytes >> 20 else ""
    words += " and their second moment" if options.moment_itemsize else ""
    require_memory(dim * options.column_bytes + table_bytes + gram_bytes, device, words)


def is_row_sparse(grad: Tensor, options: ParameterWindowOptions) -> bool:
    """Whether a parameter with this first gradient gets row-sparse columns."""
    if not options.row_sparse or grad.is_sparse:
        return options.row_sparse
    if grad.ndim != 2 or grad.numel() < ROW_SPARSE_MIN_NUMEL:
        return False
    # A gradient of zeros says nothing of those to come, as that of an adapter whose other factor begins at zero.
    return 0 < len(nonzero_rows(grad).rows) <= ROW_SPARSE_MAX_DENSITY * grad.shape[0]


def kept_positions(mask: Tensor | None) -> Tensor | None:
    """Flat positions that a mask keeps; None without a mask."""
    return None if mask is None else mask.reshape(-1).nonzero().squeeze(1)


def to_dense(
    placement: TablePlacement,
    count: int,
    options: ParameterWindowOptions,
    keep: Tensor | None,
    device: torch.device,
) -> DensePlacement:
    """The same columns (those in ``keep``) in a dense store, for gradients that turned out not to be row-sparse.

    Args:
        placement: of the table.
        count: gradients held.
        options: num_grads, window_dtype and metric.
        keep: flat positions to keep; None keeps all.
        device: of the parameter.

    Raises:
        MemoryError: if the store does not fit; nothing changes then.
    """
    table = placement.columns
    what = f"an embedding of {table.shape[0]:,} x {table.shape[1]} whose gradients are no longer row-sparse"
    dim = table.dim if keep is None else len(keep)
    require_memory(dim * options.column_bytes, table.device, what)
    dense = DenseColumns(
        options.num_grads,
        dim,
        dtype=options.window_dtype,
        device=table.device,
        compute_device=options.compute_device(device),
    )
    for row in range(count):
        flat_D = table.row(row)
        dense.write(row, flat_D if keep is None else flat_D[keep.to(flat_D.device)])
    return DensePlacement(dense, placement.shape, 0, dim, keep)


def distinct_columns(placements: Iterable[Placement]) -> list[ColumnStore]:
    """The column stores of these placements, each once, in order."""
    return list(dict.fromkeys(placement.columns for placement in placements))
