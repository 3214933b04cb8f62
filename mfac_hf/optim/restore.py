"""From a saved state that was checked back to the columns of its parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mfac_hf.fisher.columns import DenseColumns, RowSparseColumns
from mfac_hf.optim.borrowed import alias
from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.placement import DensePlacement, Placement, TablePlacement, kept_positions
from mfac_hf.optim.sharded import local

__all__ = ["restore_placements"]


def restore_placements(
    states: dict[Tensor, dict[str, Any]],
    masks: dict[Tensor, Tensor],
    options: ParameterWindowOptions,
    shapes: Mapping[Tensor, Sequence[int]] | None = None,
) -> dict[Tensor, Placement]:
    """Placements, in the order of their columns; of the parameters as they lie here, unless ``shapes`` says of what.

    Each store goes to the device that has the fewest bytes so far.
    """
    placed = {p: state for p, state in states.items() if "window_store" in state}
    if not placed:
        return {}
    shapes = {p: local(p).shape for p in placed} if shapes is None else shapes
    placements: dict[Tensor, Placement] = {}
    load = dict.fromkeys(options.devices(next(iter(placed)).device), 0)
    for store in sorted({state["window_store"] for state in placed.values()}):
        members = {p: state for p, state in placed.items() if state["window_store"] == store}
        members = dict(sorted(members.items(), key=lambda item: item[1]["window_start"]))
        device = min(load, key=lambda device: load[device])
        p, state = next(iter(members.items()))
        if "window_rows" in state:
            placements[p] = _restore_table(torch.Size(shapes[p]), state, device)
        else:
            placements |= _restore_dense(members, masks, shapes, device, options.compute_device(p.device))
        load[device] += placements[p].columns.nbytes
    return placements


def _restore_table(shape: torch.Size, state: dict[str, Any], device: torch.device) -> TablePlacement:
    rows, values = state["window_rows"].to(device), state["window_values"].to(device)
    height, width = shape
    table = RowSparseColumns(len(rows), (height, width), buffers=(rows, values))
    return TablePlacement(table, shape)


def _restore_dense(
    members: dict[Tensor, dict[str, Any]],
    masks: dict[Tensor, Tensor],
    shapes: Mapping[Tensor, Sequence[int]],
    device: torch.device,
    compute_device: torch.device | None,
) -> dict[Tensor, Placement]:
    """Placements of the parameters that share one dense store, in the order of their columns."""
    views = [state["window"].reshape(len(state["window"]), state["window"][0].numel()) for state in members.values()]
    buffer_MD = _shared_buffer(views).to(device)
    columns = DenseColumns(*buffer_MD.shape, buffer=buffer_MD, compute_device=compute_device)
    return {
        p: DensePlacement(
            columns, torch.Size(shapes[p]), state["window_start"], view.shape[1], kept_positions(masks.get(p))
        )
        for (p, state), view in zip(members.items(), views, strict=True)
    }


def _shared_buffer(views: list[Tensor]) -> Tensor:
    """The (m, d) buffer whose columns these views are; a copy where they are not neighbours in one."""
    num_grads, dim = len(views[0]), sum(view.shape[1] for view in views)
    start = 0
    storage = views[0].untyped_storage().data_ptr()
    for view in views:
        rows_apart = num_grads == 1 or view.stride(0) == dim
        placed = view.storage_offset() == start and rows_apart and (view.shape[1] <= 1 or view.stride(1) == 1)
        if view.untyped_storage().data_ptr() != storage or not placed:
            return torch.cat(views, dim=1)
        start += view.shape[1]
    return alias(views[0], (num_grads, dim), (dim, 1), 0)
