"""The gradient window in an optimizer's state: what a saved state has to look like.

The state of a parameter p holds plain tensors and numbers only:

- ``window`` (m, *p.shape), a view of the buffer that p shares with others ((m, kept) if p has a mask), or
  ``window_rows`` (m, n) and ``window_values`` (m, n, h) for row-sparse columns; ``window_store`` and ``window_start``
  say where;
- in Adam's metric ``second_moment``, of the parameter's shape ((kept,) if it has a mask), and ``moment_step``, the
  steps that it has seen; for row-sparse columns ``moment_steps`` (v,), the step at which each row was last touched;
- ``step``; ``momentum_buffer`` and ``mask`` where there are any;
- for the first parameter with columns also ``gram`` (m, m), ``pushed``, ``skipped_steps``, ``jitter_escalations`` and
  ``window_parameters``, the number of parameters with columns.
"""

from collections.abc import Hashable, Iterator, Mapping, MutableMapping
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.parameter_window import ParameterWindow
from mfac_hf.optim.plausible import (
    as_count,
    check_counters,
    check_gram,
    check_momentum,
    check_places,
    check_second_moment,
)
from mfac_hf.optim.sharded import is_sharded

__all__ = ["WINDOW_KEYS", "check_state", "publish_window", "without_window"]

LEAD_KEYS = ("gram", "pushed", "skipped_steps", "jitter_escalations", "window_parameters")
GROUP_KEYS = {
    "adam": ("lr", "betas", "eps", "weight_decay", "damping"),
    "identity": ("lr", "momentum", "weight_decay", "decoupled_weight_decay"),
}
WINDOW_KEYS = ("window", "window_rows", "window_values", "window_store", "window_start", *LEAD_KEYS)
TENSOR_KEYS = {
    *("window", "window_rows", "window_values", "gram", "mask", "momentum_buffer", "second_moment", "moment_steps"),
}
MOMENT_KEYS = ("second_moment", "moment_step", "moment_steps")


class _Saved(NamedTuple):
    """The saved state of one parameter, and what an error calls it."""

    parameter: Tensor
    state: dict[str, Any]
    label: str


def publish_window(
    window: ParameterWindow, states: MutableMapping[Tensor, dict[str, Any]], skipped_steps: int
) -> None:
    """Put the window into the states of its parameters: views of its buffers, no copies.

    After each step, not when the state is read: a ``state_dict`` that somebody holds has the same dictionaries, and
    would mix today's gradients with the counters of then. Views of dense columns stay right as long as the window is
    not rearranged; tables may have grown.
    """
    changed = window.placements if window.rearranged else window.tables
    stores = {columns: i for i, columns in enumerate(window.columns)} if changed else {}
    for p, placement in changed.items():
        entries = {**placement.state(), "window_store": stores[placement.columns], "window_start": placement.start}
        entries |= window.metric.state(placement)
        state = states[p]
        for name in [name for name in state if name in (*WINDOW_KEYS, "moment_steps") and name not in entries]:
            del state[name]  # of columns that have become dense
        state.update(entries)
    window.rearranged = False
    if window.placements:
        states[next(iter(window.placements))].update(
            gram=window.gram.gram_MM,
            pushed=window.gram.pushed,
            jitter_escalations=window.gram.jitter_escalations,
            window_parameters=len(window.placements),
            skipped_steps=skipped_steps,
        )


def without_window(states: dict[Any, dict[str, Any]], *, moments: bool) -> dict[Any, dict[str, Any]]:
    """The same states without their part of the window, in new dictionaries.

    Args:
        states: by parameter.
        moments: whether to keep the second moments of Adam's metric.
    """
    dropped = WINDOW_KEYS if moments else (*WINDOW_KEYS, *MOMENT_KEYS)
    return {key: {name: v for name, v in state.items() if name not in dropped} for key, state in states.items()}


def check_state(
    state_dict: dict[str, Any],
    groups: list[dict[str, Any]],
    masks: dict[Tensor, Tensor],
    options: ParameterWindowOptions,
) -> dict[Tensor, dict[str, Any]]:
    """The saved state of each parameter that has one.

    Args:
        state_dict: what was saved.
        groups: parameter groups of the optimizer that loads it.
        masks: of its parameters that have one.
        options: of its window.

    Raises:
        ValueError: names the first thing that does not fit.
    """
    _check_groups(state_dict, groups, options)
    saved = list(_saved_states(state_dict, groups))
    with_window = []
    for entry in saved:
        _check_types(entry)
        _check_mask(entry, masks.get(entry.parameter))
        _check_momentum(entry)
        check_counters(entry.state, entry.label)
        check_second_moment(entry.state, entry.parameter.shape, entry.label)
        if "window" in entry.state or "window_rows" in entry.state:
            _check_columns(entry, options)
            with_window.append(entry)
        elif "window_store" in entry.state:
            raise ValueError(f"the state of {entry.label} lacks its window: the state is truncated")
    if with_window:
        _check_lead(with_window, options.num_grads)
    return {parameter: state for parameter, state, _ in saved if state}


def _check_groups(state_dict: dict[str, Any], groups: list[dict[str, Any]], options: ParameterWindowOptions) -> None:
    """The saved parameter groups are this optimizer's: as many parameters, MFAC's options, the same names."""
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get(key), kind):
            raise ValueError(f"the optimizer state has no {key!r}: it is truncated, or not an optimizer's state")
    saved_groups = state_dict["param_groups"]
    for saved in saved_groups:
        if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), list):
            raise ValueError("a saved parameter group has no list of 'params': it is truncated, or not an optimizer's")
    _check_is_ours(state_dict, options.metric)
    saved_sizes, sizes = ([len(group["params"]) for group in gs] for gs in (saved_groups, groups))
    if saved_sizes != sizes:
        raise ValueError(
            f"the saved optimizer has parameter groups of {saved_sizes} parameters, this one of {sizes}; "
            "build the optimizer from the same model with the same groups"
        )
    for saved, own in zip(saved_groups, groups, strict=True):
        if "param_names" in saved and "param_names" in own and saved["param_names"] != own["param_names"]:
            pairs = zip_longest(saved["param_names"], own["param_names"])
            first = next(((a, b) for a, b in pairs if a != b), (None, None))
            raise ValueError(
                f"parameters in another order: the saved state has {first[0]!r} where this optimizer has {first[1]!r}"
            )


def _check_is_ours(state_dict: dict[str, Any], metric: str) -> None:
    """The saved state is MFAC's, and not that of the optimizer with which a run was begun."""
    states = [state for state in state_dict["state"].values() if isinstance(state, Mapping)]
    for saved in state_dict["param_groups"]:
        if others := [name for name, keys in GROUP_KEYS.items() if name != metric and saved.keys() >= set(keys)]:
            raise ValueError(
                f"the saved optimizer has metric={others[0]!r}, this one metric={metric!r}: build it like that one"
            )
        missing = [key for key in GROUP_KEYS[metric] if key not in saved]
        if missing:
            seen = sorted({str(key) for state in states for key in state} | {*map(str, saved)} - {"params"})
            raise ValueError(
                f"the saved parameter groups lack {', '.join(missing)}: the state of another optimizer, not of MFAC "
                f"(it has {', '.join(seen)}). Start MFAC anew from the weights: leave optimizer.pt out of the "
                "checkpoint, or do not resume"
            )


def _check_types(entry: _Saved) -> None:
    """Tensors are where a state of MFAC has tensors."""
    for key in TENSOR_KEYS & entry.state.keys():
        value = entry.state[key]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise ValueError(
                f"{key} of {entry.label} is {value!r:.80} in the saved state; expected a dense tensor with numbers"
            )


def _saved_states(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> Iterator[_Saved]:
    """Each parameter of the optimizer, in order, with its saved state (empty where it has none)."""
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    parameters = chain.from_iterable(group["params"] for group in groups)
    names = chain.from_iterable(group.get("param_names", [None] * len(group["params"])) for group in groups)
    for position, (key, p, name) in enumerate(zip(keys, parameters, names, strict=True)):
        label = f"parameter {name or position} of shape {tuple(p.shape)}"
        state = state_dict["state"].get(key, {}) if isinstance(key, Hashable) else None
        if not isinstance(state, Mapping):
            raise ValueError(
                f"the saved state of {label} is {state!r:.80}; expected a dictionary: the file is damaged"
            )
        yield _Saved(p, dict(state), label)


def _check_mask(entry: _Saved, own: Tensor | None) -> None:
    """A saved mask may keep less than the optimizer's own, as after pruning steps, but not more."""
    saved = entry.state.get("mask")
    if saved is not None and is_sharded(entry.parameter):
        raise ValueError(f"the state has a mask of {entry.label}, which is sharded here: MFAC masks whole parameters")
    if saved is not None and (saved.shape != entry.parameter.shape or saved.dtype != torch.bool):
        raise ValueError(
            f"the saved mask of {entry.label} is {saved.dtype} of shape {tuple(saved.shape)}: another model, or a "
            "damaged file"
        )
    if own is not None and (saved is None or bool((saved.cpu() & ~own.cpu()).any())):
        raise ValueError(
            f"the saved optimizer trained weights that the mask of {entry.label} excludes; pass the masks that it had"
        )


def _check_momentum(entry: _Saved) -> None:
    momentum = entry.state.get("momentum_buffer")
    if momentum is not None and momentum.shape != entry.parameter.shape:
        raise ValueError(
            f"the saved momentum of {entry.label} has shape {tuple(momentum.shape)}: another model or order"
        )
    if momentum is not None:
        check_momentum(momentum, entry.label)


def _check_columns(entry: _Saved, options: ParameterWindowOptions) -> None:
    """The saved columns of a parameter are complete, of its shape, and of this optimizer's window."""
    parameter, state, label = entry
    num_grads, mask = options.num_grads, state.get("mask")
    for key in ("window_store", "window_start", "step"):
        if key not in state:
            raise ValueError(f"the state of {label} lacks {key!r}: the state is truncated")
    if "window" in state:
        found, dtype = state["window"], options.window_dtype
        expected = (num_grads, *parameter.shape) if mask is None else (num_grads, int(mask.sum()))
    else:
        if "window_values" not in state:
            raise ValueError(f"the state of {label} lacks 'window_values': the state is truncated")
        found, dtype = state["window_values"], options.result_dtype
        if parameter.ndim != 2 or state["window_rows"].ndim != 2 or state["window_rows"].dtype != torch.int64:
            raise ValueError(f"the saved rows of {label} are not those of a table: another model, or a damaged file")
        expected = (num_grads, state["window_rows"].shape[1], *parameter.shape[1:])
    if found.ndim and found.shape[0] != num_grads:
        raise ValueError(
            f"the saved window holds {found.shape[0]} gradients, this optimizer {num_grads}; "
            f"pass num_grads={found.shape[0]}"
        )
    if tuple(found.shape) != expected:
        raise ValueError(
            f"the saved window of {label} has shape {tuple(found.shape)}; expected {expected}: another model or order"
        )
    if found.dtype != dtype:
        raise ValueError(
            f"the saved window of {label} is {found.dtype}, expected {dtype}; pass the saved window_dtype"
        )
    if "window_rows" in state:
        _check_rows(state["window_rows"], found.shape[:2], parameter.shape[0], label)


def _check_rows(rows: Tensor, shape: torch.Size, height: int, label: str) -> None:
    """The row numbers of a table ascend, and empty slots (which hold the table's height) come last."""
    ascending = (rows[:, 1:] > rows[:, :-1]) | (rows[:, 1:] == height)
    inside = bool(((rows >= 0) & (rows <= height)).all())
    if rows.shape != shape or not inside or not ascending.all():
        raise ValueError(f"the saved rows of {label} are not those of such a table: another model, or a damaged file")


def _check_lead(with_window: list[_Saved], num_grads: int) -> None:
    """One parameter has the Gram matrix and the counters, no parameter's columns are missing, and all fit together."""
    leads = [entry for entry in with_window if "gram" in entry.state]
    if len(leads) != 1 or any(key not in leads[0].state for key in LEAD_KEYS):
        raise ValueError("the saved window has no Gram matrix or counters: the state is truncated")
    lead = leads[0].state
    expected, gram_MM = as_count(lead, "window_parameters", 1, leads[0].label), lead["gram"]
    if len(with_window) != expected:
        raise ValueError(
            f"the saved window is of {expected} parameters, but {len(with_window)} have their columns in the state: "
            "the state is truncated"
        )
    if gram_MM.shape != (num_grads, num_grads):
        raise ValueError(f"the saved Gram matrix is {tuple(gram_MM.shape)}; expected {(num_grads, num_grads)}")
    if not gram_MM.is_floating_point():
        raise ValueError(f"the saved Gram matrix is of {gram_MM.dtype}; expected torch.float64: a damaged file")
    check_places(
        (state, state["window"][0].numel() if "window" in state else p.numel()) for p, state, _ in with_window
    )
    check_gram(lead, ({**state, "table_height": p.shape[0] if p.ndim else 1} for p, state, _ in with_window))
