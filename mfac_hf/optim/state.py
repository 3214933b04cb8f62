"""The gradient window in an optimizer's state: what a saved state has to look like, and the way back from it.

The state of a parameter p holds plain tensors and numbers only:

- ``window`` (m, *p.shape), a view of the buffer that p shares with others ((m, kept) if p has a mask), or
  ``window_rows`` (m, n) and ``window_values`` (m, n, h) for row-sparse columns; ``window_store`` and ``window_start``
      say where;
- ``step``; ``momentum_buffer`` and ``mask`` where there are any;
- for the first parameter with columns also ``gram`` (m, m), ``pushed``, ``skipped_steps``, ``jitter_escalations`` and
  ``window_parameters``, the number of parameters with columns.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mfac_hf.fisher.columns import DenseColumns, RowSparseColumns
from mfac_hf.optim.placement import Placement, kept_positions

__all__ = ["WINDOW_KEYS", "check_state", "restore_placements"]

LEAD_KEYS = ("gram", "pushed", "skipped_steps", "jitter_escalations", "window_parameters")
GROUP_KEYS = ("lr", "momentum", "weight_decay", "decoupled_weight_decay")
WINDOW_KEYS = ("window", "window_rows", "window_values", "window_store", "window_start", *LEAD_KEYS)


def check_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """The saved state of each parameter of the optimizer; a ValueError names the first thing that does not fit."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"the optimizer state has no {key!r}: it is truncated, or not an optimizer's state")
    saved_groups, groups = state_dict["param_groups"], optimizer.param_groups
    saved_sizes, sizes = ([len(group["params"]) for group in gs] for gs in (saved_groups, groups))
    if saved_sizes != sizes:
        raise ValueError(
            f"the saved optimizer has parameter groups of {saved_sizes} parameters, this one of {sizes}; "
            "build the optimizer from the same model with the same groups"
        )
    for saved, own in zip(saved_groups, groups, strict=True):
        missing = [key for key in GROUP_KEYS if key not in saved]
        if missing:
            raise ValueError(f"the saved parameter groups lack {', '.join(missing)}: the state of another optimizer")
        if "param_names" in saved and "param_names" in own and saved["param_names"] != own["param_names"]:
            first = next((a, b) for a, b in zip(saved["param_names"], own["param_names"], strict=True) if a != b)
            raise ValueError(
                f"parameters in another order: the saved state has {first[0]!r} where this optimizer has {first[1]!r}"
            )
    ids = chain.from_iterable(group["params"] for group in saved_groups)
    parameters = chain.from_iterable(group["params"] for group in groups)
    names = chain.from_iterable(group.get("param_names", [None] * len(group["params"])) for group in groups)
    result = {}
    with_window = []
    for position, (key, p, name) in enumerate(zip(ids, parameters, names, strict=True)):
        state = state_dict["state"].get(key, {})
        own_mask = optimizer.state[p].get("mask") if p in optimizer.state else None
        label = f"parameter {name or position} of shape {tuple(p.shape)}"
        _check_mask(label, state.get("mask"), p, own_mask)
        if "momentum_buffer" in state and state["momentum_buffer"].shape != p.shape:
            found = tuple(state["momentum_buffer"].shape)
            raise ValueError(f"the saved momentum of {label} has shape {found}: another model or order")
        if "window" in state or "window_rows" in state:
            _check_window(label, state, p, state.get("mask"), optimizer.defaults)
            with_window.append(state)
        elif "window_store" in state:
            raise ValueError(f"the state of {label} lacks its window: the state is truncated")
        if state:
            result[p] = dict(state)
    if with_window:
        leads = [state for state in with_window if "gram" in state]
        if len(leads) != 1 or any(key not in leads[0] for key in LEAD_KEYS):
            raise ValueError("the saved window has no Gram matrix or counters: the state is truncated")
        if len(with_window) != leads[0]["window_parameters"]:
            raise ValueError(
                f"the saved window is of {leads[0]['window_parameters']} parameters, but {len(with_window)} have "
                "their "
                "columns in the state: the state is truncated"
            )
        num_grads = optimizer.defaults["num_grads"]
        if leads[0]["gram"].shape != (num_grads, num_grads):
            raise ValueError(
                f"the saved Gram matrix is {tuple(leads[0]['gram'].shape)}; expected {(num_grads, num_grads)}"
            )
    return result


def _check_mask(label: str, saved: Tensor | None, p: Tensor, own: Tensor | None) -> None:
    """A saved mask may keep less than the optimizer's own, as after pruning steps, but not more."""
    if saved is not None and (saved.shape != p.shape or saved.dtype != torch.bool):
        raise ValueError(
            f"the saved mask of {label} is {saved.dtype} of shape {tuple(saved.shape)}: another model, or a damaged "
            "file"
        )
    if own is not None and (saved is None or bool((saved.cpu() & ~own.cpu()).any())):
        raise ValueError(
            f"the saved optimizer trained weights that the mask of {label} excludes; pass the masks that it had"
        )


def _check_window(label: str, state: dict[str, Any], p: Tensor, mask: Tensor | None, options: dict[str, Any]) -> None:
    num_grads, dtype = options["num_grads"], options["window_dtype"]
    for key in ("window_store", "window_start"):
        if key not in state:
            raise ValueError(f"the state of {label} lacks {key!r}: the state is truncated")
    if "window" in state:
        expected = (num_grads, *p.shape) if mask is None else (num_grads, int(mask.sum()))
        found, found_dtype = state["window"].shape, state["window"].dtype
    else:
        if "window_values" not in state:
            raise ValueError(f"the state of {label} lacks 'window_values': the state is truncated")
        values = state["window_values"]
        slots = state["window_rows"].shape[1]
        expected = (num_grads, slots, *p.shape[1:])
        found, found_dtype = values.shape, values.dtype
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if found[0] != num_grads:
        raise ValueError(
            f"the saved window holds {found[0]} gradients, this optimizer {num_grads}; pass num_grads={found[0]}"
        )
    if tuple(found) != tuple(expected):
        raise ValueError(
            f"the saved window of {label} has shape {tuple(found)}; expected {tuple(expected)}: another model or order"
        )
    if found_dtype != dtype:
        raise ValueError(
            f"the saved window of {label} is {found_dtype}, expected {dtype}; pass the saved window_dtype"
        )
    if "window_rows" in state:
        rows, height = state["window_rows"], p.shape[0]
        ascending = (rows[:, 1:] > rows[:, :-1]) | (rows[:, 1:] == height)
        if rows.shape != found[:2] or int(rows.min()) < 0 or int(rows.max()) > height or not ascending.all():
            raise ValueError(
                f"the saved rows of {label} are not those of such a table: another model, or a damaged file"
            )


def restore_placements(
    states: dict[Tensor, dict[str, Any]], masks: dict[Tensor, Tensor], options: dict[str, Any]
) -> tuple[dict[Tensor, Placement], dict[str, Any] | None]:
    """Placements, in the order of their columns, and the state with the Gram matrix, if any."""
    placed = {p: state for p, state in states.items() if "window_store" in state}
    if not placed:
        return {}, None
    placements = {}
    devices = options["window_device"] or next(iter(placed)).device
    load = {torch.device(device): 0 for device in (devices if isinstance(devices, list) else [devices])}
    for store in sorted({state["window_store"] for state in placed.values()}):
        members = {p: s for p, s in placed.items() if s["window_store"] == store}
        members = dict(sorted(members.items(), key=lambda item: item[1]["window_start"]))
        first, state = next(iter(members.items()))
        device = min(load, key=lambda device: load[device])
        if "window_rows" in state:
            rows, values = state["window_rows"].to(device), state["window_values"].to(device)
            load[device] += values.nbytes
            table = RowSparseColumns(
                options["num_grads"], (first.shape[0], first.shape[1]), dtype=values.dtype, device="meta"
            )
            table.restore(rows, values)
            placements[first] = Placement(table, first.shape, 0, first.numel())
            continue
        views = [s["window"].reshape(len(s["window"]), s["window"][0].numel()) for s in members.values()]
        buffer_MD = _shared_buffer(views).to(device)
        load[device] += buffer_MD.nbytes
        columns = DenseColumns(options["num_grads"], buffer_MD.shape[1], buffer=buffer_MD)
        for (p, s), view in zip(members.items(), views, strict=True):
            keep = kept_positions(masks.get(p))
            placements[p] = Placement(columns, p.shape, s["window_start"], view.shape[1], keep)
    return placements, next(state for state in placed.values() if "gram" in state)


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
    return views[0].as_strided((num_grads, dim), (dim, 1), 0)
