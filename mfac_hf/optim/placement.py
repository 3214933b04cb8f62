"""Which columns of the gradient window belong to which parameter.

A parameter gets its columns when its first gradient arrives, so frozen and unused parameters cost nothing, and one
that is unfrozen late joins then (with zeros in the rows already stored, which is exact). Parameters placed together
share one dense buffer, so that the two passes over the window stay two products; tables whose gradients have few
non-zero rows get row-sparse columns of their own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfac_hf.fisher.columns import DenseColumns, RowSparseColumns
from mfac_hf.memory import ROW_SPARSE_MIN_NUMEL, require_memory

__all__ = ["ROW_SPARSE_DENSIFY", "Placement", "distinct_columns", "place", "to_dense"]

# A parameter gets row-sparse columns if at most this share of the rows of its first gradient is non-zero ...
ROW_SPARSE_MAX_DENSITY = 0.25
# ... and dense ones when a later gradient exceeds this share: from about there dense is smaller and faster.
ROW_SPARSE_DENSIFY = 0.5


@dataclass
class Placement:
    """Columns of one parameter (of this rank's shard of it): ``size`` of them from ``start`` in ``columns``.

    ``shape`` is the parameter's, ``keep`` the flat positions that its mask keeps.
    """

    columns: DenseColumns | RowSparseColumns
    shape: torch.Size
    start: int
    size: int
    keep: Tensor | None = None

    def part(self, grad: Tensor | None, device: torch.device, mask: Tensor | None) -> Any:
        """The gradient as these columns store it: (size,) or (row numbers, values); zeros for None."""
        if isinstance(self.columns, RowSparseColumns):
            if grad is None:
                return torch.zeros(0, dtype=torch.int64), torch.zeros(0, self.shape[1])
            rows, values = nonzero_rows(grad)
            return rows, values if mask is None else values * mask[rows]
        if grad is None:
            return torch.zeros(self.size, device=device)
        flat = (grad.to_dense() if grad.is_sparse else grad).reshape(-1)
        return _widened(flat if self.keep is None else flat[self.keep])

    def state(self, num_grads: int) -> dict[str, Any]:
        """The window of this parameter for the optimizer's state: views of the buffers, no copies."""
        if isinstance(self.columns, RowSparseColumns):
            return {"window_rows": self.columns.rows_MN, "window_values": self.columns.values_MNH}
        view = self.columns.buffer_MD[:, self.start : self.start + self.size]
        return {"window": view if self.keep is not None else view.view(num_grads, *self.shape)}


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def nonzero_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a 2-d gradient, dense or sparse, that are not all zero: their ascending numbers, and the rows."""
    if grad.is_sparse:
        grad = grad.coalesce()
        return grad.indices()[0], _widened(grad.values())
    # Faster than looking at absolute values, and as exact; a NaN is not zero either.
    rows = ((grad.amax(dim=1) != 0) | (grad.amin(dim=1) != 0)).nonzero().squeeze(1)
    return rows, _widened(grad[rows])


def place(
    gradients: dict[Tensor, Tensor],
    masks: dict[Tensor, Tensor],
    *,
    num_grads: int,
    dtype: torch.dtype,
    devices: list[torch.device],
    row_sparse: bool,
) -> dict[Tensor, Placement]:
    """Columns for parameters that have none yet, judged by their first gradients (a parameter's own, or its shard's).

    Raises:
        MemoryError: if they do not fit, with the numbers; nothing is allocated then.
    """
    devices = list(dict.fromkeys(devices))
    tables = {p: g for p, g in gradients.items() if row_sparse and _is_row_sparse(g)}
    dense = {p: kept_positions(masks.get(p)) for p in gradients if p not in tables}
    sizes = {p: gradients[p].numel() if keep is None else len(keep) for p, keep in dense.items()}

    # Largest first onto the least loaded device, then back into the given order within each device.
    device_of: dict[Tensor, torch.device] = {}
    load = dict.fromkeys(devices, 0)
    for parameter in sorted(sizes, key=lambda p: -sizes[p]):
        device_of[parameter] = min(load, key=lambda device: load[device])
        load[device_of[parameter]] += sizes[parameter]

    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    slots = {p: max(1, min(g.shape[0], len(nonzero_rows(g)[0]) * 5 // 4)) for p, g in tables.items()}
    table_bytes = sum(num_grads * n * (tables[p].shape[1] * table_dtype.itemsize + 8) for p, n in slots.items())
    for device in devices:
        extra = table_bytes if device == devices[0] else 0
        words = f"{num_grads} gradients x {load[device]:,} parameters in {dtype}"
        words += f" and {extra >> 20} MiB of embedding rows" if extra else ""
        require_memory(num_grads * load[device] * dtype.itemsize + extra, device, words)

    placements = {}
    for device in devices:
        if device not in device_of.values():
            continue
        columns = DenseColumns(num_grads, load[device], dtype=dtype, device=device)
        start = 0
        for parameter, keep in dense.items():
            if device_of[parameter] == device:
                placements[parameter] = Placement(columns, gradients[parameter].shape, start, sizes[parameter], keep)
                start += sizes[parameter]
    for parameter, count in slots.items():
        shape = tables[parameter].shape
        store = RowSparseColumns(num_grads, (shape[0], shape[1]), dtype=table_dtype, device=devices[0], slots=count)
        placements[parameter] = Placement(store, shape, 0, shape.numel())
    return placements


def _is_row_sparse(grad: Tensor) -> bool:
    if grad.is_sparse:
        return True
    if grad.ndim != 2 or grad.numel() < ROW_SPARSE_MIN_NUMEL:
        return False
    return len(nonzero_rows(grad)[0]) <= ROW_SPARSE_MAX_DENSITY * grad.shape[0]


def stored_numbers(grad: Tensor, mask: Tensor | None, row_sparse: bool) -> int:
    """Numbers that the columns of a parameter with this first gradient hold for each gradient."""
    if row_sparse and _is_row_sparse(grad):
        return nonzero_rows(grad)[1].numel()
    return grad.numel() if mask is None else int(mask.sum())


def kept_positions(mask: Tensor | None) -> Tensor | None:
    """Flat positions that a mask keeps; None without a mask."""
    return None if mask is None else mask.reshape(-1).nonzero().squeeze(1)


def to_dense(columns: RowSparseColumns, count: int, dtype: torch.dtype, keep: Tensor | None = None) -> DenseColumns:
    """The same columns (those in ``keep``) as a dense buffer, for gradients that turned out not to be row-sparse.

    Raises:
        MemoryError: if the buffer does not fit; nothing changes then.
    """
    num_grads = len(columns.rows_MN)
    what = f"an embedding of {columns.shape[0]:,} x {columns.shape[1]} whose gradients are no longer row-sparse"
    dim = columns.dim if keep is None else len(keep)
    require_memory(num_grads * dim * dtype.itemsize, columns.device, what)
    dense = DenseColumns(num_grads, dim, dtype=dtype, device=columns.device)
    for row in range(count):
        flat_D = columns.row(row)
        dense.write(row, flat_D if keep is None else flat_D[keep.to(flat_D.device)])
    return dense


def distinct_columns(placements: Iterable[Placement]) -> list[DenseColumns | RowSparseColumns]:
    """The column stores of these placements, each once, in order."""
    return list({id(placement.columns): placement.columns for placement in placements}.values())
