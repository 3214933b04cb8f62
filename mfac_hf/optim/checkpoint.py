"""Reading a gradient window from disk on any number of ranks, each what it needs.

What lies there are parts of parameters (`mfac_hf.optim.window_folder`): whole ones, or the rows or shards that ranks
had, from which each takes what it needs (`mfac_hf.optim.window_needs`). No rank ever holds the whole window.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.optim.groups import labels
from mfac_hf.optim.parameter_window import ParameterWindow
from mfac_hf.optim.plausible import TOLERANCE, squared_lengths
from mfac_hf.optim.restore import restore_placements
from mfac_hf.optim.second_moment import SavedMoment
from mfac_hf.optim.sharded import Layout, local
from mfac_hf.optim.window_folder import HeldWindow, Part, WindowFolder, weight_norms
from mfac_hf.optim.window_needs import Need, Resumed, needs_of, owners_of, slices, states_of

__all__ = ["LoadedWindow", "load_window", "share_out"]

# Sums of squares over shards are in another order than over the whole; weights of another step differ by far more.
NORM_TOLERANCE = 1e-9


class LoadedWindow(NamedTuple):
    """What a folder gives this rank.

    Attributes:
        window: with this rank's columns.
        counters: of each parameter with columns on any rank, what its state has to say of steps.
        skipped_steps: so far.
    """

    window: ParameterWindow
    counters: dict[Tensor, dict[str, int]]
    skipped_steps: int


def load_window(directory: Path, resumed: Resumed) -> LoadedWindow:
    """Read this rank's part of a window; all ranks that are to hold it call this.

    Raises:
        FileNotFoundError: there is no window, or it was not finished.
        ValueError: on every rank, if it is damaged, or another optimizer's, model's or step's.
    """
    ranks, num_grads = resumed.ranks, resumed.options.num_grads
    norms = weight_norms(resumed.parameters, resumed.layout)
    loaded, error, lengths_M = None, None, torch.zeros(num_grads, dtype=torch.float64)
    try:
        loaded, lengths_M = _read(WindowFolder(directory), resumed, norms)
    except (OSError, ValueError) as reason:
        error = reason
    failed = torch.tensor([0.0 if error is None else 1.0], dtype=torch.float64)
    sums = torch.cat([lengths_M, failed]).to(local(resumed.parameters[0]).device)
    if ranks is not None:
        dist.all_reduce(sums, group=ranks)
    lengths_M, failed = sums[:-1].cpu(), sums[-1]
    if error is not None:
        raise error
    if failed or loaded is None:
        raise ValueError(f"{directory} could not be read on {float(failed):g} other ranks, which say why")
    held_M = loaded.window.gram.gram_MM.diagonal().cpu()
    if not bool(((lengths_M - held_M).abs() <= TOLERANCE * torch.maximum(lengths_M, held_M)).all()):
        raise ValueError(f"{directory}: the Gram matrix does not belong to the stored gradients. A file is damaged")
    return loaded


def _read(folder: WindowFolder, resumed: Resumed, norms: Tensor) -> tuple[LoadedWindow, Tensor]:
    """This rank's window, and the squared lengths of what counts here of the stored gradients, (m,)."""
    _check(folder, resumed, norms)
    window, states = _take(folder, resumed)
    lengths_M = torch.zeros(resumed.options.num_grads, dtype=torch.float64)
    for p, state in states.items():
        if p not in window.copies:
            height = window.placements[p].shape[0] if p.ndim else 1
            lengths_M += squared_lengths({**state, "table_height": height}, resumed.options.num_grads)
    counters = {}
    for number, (part, *_) in folder.parts.items():
        moment = {"moment_step": part.moment_step} if part.moment_step else {}
        counters[resumed.parameters[number]] = {"step": part.step, **moment}
    return LoadedWindow(window, counters, folder.skipped_steps), lengths_M


def share_out(window: ParameterWindow, states: Mapping[Tensor, dict[str, Any]], resumed: Resumed) -> ParameterWindow:
    """This rank's part of a window that every rank holds whole.

    Args:
        window: the whole window.
        states: of the optimizer, which show it.
        resumed: the optimizer, with the ranks that are to share it.
    """
    window.clear_unwritten()
    return _take(HeldWindow(window, resumed.parameters, states), resumed)[0]


def _take(source: WindowFolder | HeldWindow, resumed: Resumed) -> tuple[ParameterWindow, dict[Tensor, dict[str, Any]]]:
    """This rank's window, and what its parameters' states have of it."""
    owners = owners_of(source, resumed)
    needs = needs_of(source, resumed, owners)
    states = states_of(source, needs, resumed)
    ranks = 1 if resumed.ranks is None else dist.get_world_size(resumed.ranks)
    as_before = source.ranks == ranks and source.is_shared == (resumed.sharing is not None)
    if as_before and all(need.is_there for need in needs.values()):
        _place_as_before(states, needs)
    else:
        _place_anew(states, resumed.layout)
    moments = {}
    for p, state in states.items():
        if "second_moment" in state:
            scaling = resumed.scaling(p, needs[p].sources[0].moment_step)
            moments[p] = SavedMoment(state["second_moment"], state.get("moment_steps"), scaling)
    masks = {p: mask.to(p.device) for p, need in needs.items() if (mask := need.own_mask()) is not None}
    shapes = {p: need.shape for p, need in needs.items()}
    window = ParameterWindow(
        restore_placements(states, masks, resumed.options, shapes),
        resumed.options,
        moments=moments,
        sharing=resumed.sharing,
        layout=resumed.layout,
    )
    window.owners = owners
    window.gram.restore(source.gram.to(window.gram.gram_MM.device), source.pushed, source.jitter_escalations)
    return window, states


def _check(folder: WindowFolder, resumed: Resumed, norms: Tensor) -> None:
    """The window is of these parameters, as they are now, and of these options."""
    path, options, parameters = folder.path, resumed.options, resumed.parameters
    if len(folder.norms) != len(parameters):
        raise ValueError(f"{path} is of {len(folder.norms)} parameters, this optimizer has {len(parameters)}")
    if len(folder.gram) != options.num_grads:
        raise ValueError(
            f"{path} holds {len(folder.gram)} gradients, this optimizer {options.num_grads}; pass "
            f"num_grads={len(folder.gram)}"
        )
    names = labels(list(resumed.groups))
    for number, found in folder.parts.items():
        p, label = parameters[number], names[number]
        for part in found:
            _check_part(folder, part, p, label, resumed)
        if sum(torch.Size(part.shape).numel() for part in found) != p.numel():
            raise ValueError(f"{path} does not hold the whole of {label}: another model, or a part is missing")
    away = ((norms - folder.norms).abs() > NORM_TOLERANCE * folder.norms) & (folder.norms > 0)
    if bool(away.any()):
        first = int(away.nonzero()[0])
        raise ValueError(
            f"{path} was saved when {names[first]} had the norm {float(folder.norms[first]):.9g}, and it is "
            f"{float(norms[first]):.9g} now: load the weights of the same checkpoint first"
        )


def _check_part(folder: WindowFolder, part: Part, p: Tensor, label: str, resumed: Resumed) -> None:
    path, names, options = folder.path, folder.names(part), resumed.options
    if ("second_moment" in names) != (options.metric == "adam"):
        metric = "adam" if "second_moment" in names else "identity"
        raise ValueError(f"{path} is of metric={metric!r}, this optimizer of metric={options.metric!r}")
    shape, dtype = folder.stored(part)
    expected = options.window_dtype if "window" in names else options.result_dtype
    if dtype != expected:
        raise ValueError(f"{path} holds {label} in {dtype}, expected {expected}; pass the saved window_dtype")
    if "window" in names:
        if len(part.shape) != p.ndim:
            raise ValueError(f"{path} holds a part of shape {part.shape} of {label}: another model")
        mask = resumed.masks.get(p)
        size = part.shape if mask is None else (int(mask[slices(*part.box)].sum()),)
        if tuple(shape) != size:
            raise ValueError(
                f"{path} holds gradients of shape {tuple(shape)} of {label}, expected {size}: another model or mask"
            )


def _place_as_before(states: Mapping[Tensor, dict[str, Any]], needs: Mapping[Tensor, Need]) -> None:
    """Give each parameter the place in its store that it had."""
    parts = {p: need.sources[0] for p, need in needs.items()}
    stores = sorted({(part.store, part.rank) for part in parts.values()})
    for p, part in parts.items():
        states[p].update(window_store=stores.index((part.store, part.rank)), window_start=part.start)


def _place_anew(states: Mapping[Tensor, dict[str, Any]], layout: Layout | None) -> None:
    """Give each parameter a place: one store for all dense ones that are placed alike, and one for each table."""
    stores: dict[Any, int] = {}
    filled: dict[int, int] = {}
    for number, (p, state) in enumerate(states.items()):
        kind = (None if layout is None else layout.kinds[p]) if "window" in state else ("table", number)
        store = stores.setdefault(kind, len(stores))
        state.update(window_store=store, window_start=filled.get(store, 0))
        if "window" in state:
            filled[store] = filled.get(store, 0) + state["window"][0].numel()
