"""Reading a gradient window from disk on any number of ranks, each what it needs.

What lies there are parts of parameters (`mfac_hf.optim.window_folder`): whole ones, or the shards that ranks had. A
rank takes the parts that are what it needs as they are, and cuts others to size, one parameter at a time. No rank ever
holds the whole window.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.fisher.columns import SparseRows
from mfac_hf.optim.groups import labels
from mfac_hf.optim.metric import SavedMoment, Scaling, as_of_now
from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.parameter_window import ParameterWindow
from mfac_hf.optim.placement import nonzero_rows
from mfac_hf.optim.plausible import TOLERANCE, squared_lengths
from mfac_hf.optim.restore import restore_placements
from mfac_hf.optim.sharded import Layout, box_of, local
from mfac_hf.optim.sharing import Owner, assign_owners
from mfac_hf.optim.window_folder import Part, WindowFolder, weight_norms

__all__ = ["LoadedWindow", "Resumed", "load_window"]

# Sums of squares over shards are in another order than over the whole; weights of another step differ by far more.
NORM_TOLERANCE = 1e-9


class Resumed(NamedTuple):
    """The optimizer that reads a window.

    Attributes:
        groups: its parameter groups; the weights are those of then.
        masks: of its parameters that have one.
        options: of its window.
        sharing: ranks that are to share the window.
        layout: how the parameters lie on the ranks, where they are placed on a mesh.
    """

    groups: Sequence[dict[str, Any]]
    masks: Mapping[Tensor, Tensor]
    options: ParameterWindowOptions
    sharing: dist.ProcessGroup | None
    layout: Layout | None

    @property
    def ranks(self) -> dist.ProcessGroup | None:
        """The ranks that read together."""
        return self.sharing if self.layout is None else self.layout.group

    @property
    def parameters(self) -> list[Tensor]:
        """All of them, in order."""
        return [p for group in self.groups for p in group["params"]]

    def scaling(self, p: Tensor, step: int) -> Scaling:
        """What the second moment of a parameter needs."""
        group = next(group for group in self.groups if any(p is q for q in group["params"]))
        return Scaling(group["betas"][1], group["eps"], step)


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
    parameters, options = resumed.parameters, resumed.options
    _check(folder, resumed, norms)
    owners = _owners(folder, resumed)
    rank = 0 if resumed.sharing is None else dist.get_rank(resumed.sharing)
    own = {p: _sources(folder.parts[number], p) for number, p in enumerate(parameters) if _is_own(owners, p, rank)}
    states = _states(folder, own, resumed)
    ranks = 1 if resumed.ranks is None else dist.get_world_size(resumed.ranks)
    as_before = folder.ranks == ranks and folder.is_shared == (resumed.sharing is not None)
    if as_before and all(sources[0].box == _box(p) for p, sources in own.items()):
        _place_as_before(states, own)
    else:
        _place_anew(states, resumed.layout)
    lengths_M = torch.zeros(options.num_grads, dtype=torch.float64)
    for p, state in states.items():
        if resumed.layout is None or p not in resumed.layout.copies:
            height = local(p).shape[0] if p.ndim else 1
            lengths_M += squared_lengths({**state, "table_height": height}, options.num_grads)
    moments = {
        p: SavedMoment(state["second_moment"], state.get("moment_steps"), resumed.scaling(p, own[p][0].moment_step))
        for p, state in states.items()
        if "second_moment" in state
    }
    kept = {p: mask.to(p.device) for p, mask in resumed.masks.items()}
    window = ParameterWindow(
        restore_placements(states, kept, options),
        options,
        moments=moments,
        sharing=resumed.sharing,
        layout=resumed.layout,
    )
    window.owners = owners
    window.gram.restore(folder.gram.to(window.gram.gram_MM.device), folder.pushed, folder.jitter_escalations)
    counters = {}
    for number, (part, *_) in folder.parts.items():
        moment = {"moment_step": part.moment_step} if part.moment_step else {}
        counters[parameters[number]] = {"step": part.step, **moment}
    return LoadedWindow(window, counters, folder.skipped_steps), lengths_M


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
        size = (int(resumed.masks[p].sum()),) if p in resumed.masks else part.shape
        if len(part.shape) != p.ndim or tuple(shape) != size:
            raise ValueError(
                f"{path} holds gradients of shape {tuple(shape)} of {label}, expected {size}: another model or mask"
            )


def _owners(folder: WindowFolder, resumed: Resumed) -> dict[Tensor, Owner]:
    """Who keeps each parameter's columns: as before where as many ranks share the window, else dealt out anew."""
    held = {
        resumed.parameters[number]: sum(folder.nbytes(part) for part in found)
        for number, found in folder.parts.items()
    }
    if resumed.sharing is None or not folder.is_shared or folder.ranks != dist.get_world_size(resumed.sharing):
        return assign_owners(held, {}, resumed.sharing)
    before = {resumed.parameters[number]: found[0].rank for number, found in folder.parts.items()}
    return {p: Owner(rank, held[p]) for p, rank in before.items()}


def _is_own(owners: Mapping[Tensor, Owner], p: Tensor, rank: int) -> bool:
    return p in owners and owners[p].rank == rank


def _box(p: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where in the whole parameter this rank's part of it lies."""
    return box_of(p), tuple(local(p).shape)


def _sources(found: Sequence[Part], p: Tensor) -> list[Part]:
    """The part that is this rank's box of a parameter, or those that overlap it; any one if the box is empty."""
    box = _box(p)
    same = [part for part in found if part.box == box]
    return same[:1] or [part for part in found if part.overlap(box)] or list(found[:1])


def _states(
    folder: WindowFolder, own: Mapping[Tensor, Sequence[Part]], resumed: Resumed
) -> dict[Tensor, dict[str, Any]]:
    """What this rank's state is to have of each of its parameters."""
    same = {p: sources[0] for p, sources in own.items() if sources[0].box == _box(p)}
    tensors = folder.read([entry for part in same.values() for entry in folder.names(part).values()])
    states: dict[Tensor, dict[str, Any]] = {}
    for p, sources in own.items():
        if p in same:
            states[p] = {name: tensors[entry] for name, entry in folder.names(same[p]).items()}
        else:
            states[p] = _assembled(folder, sources, p, resumed)
    return states


def _assembled(folder: WindowFolder, sources: Sequence[Part], p: Tensor, resumed: Resumed) -> dict[str, Any]:
    """What this rank's box holds of a parameter, from parts of other boxes: dense, unless all of them are tables."""
    shape, num_grads = _box(p)[1], resumed.options.num_grads
    found = [(folder.read_part(part), part, places) for part in sources if (places := part.overlap(_box(p)))]
    is_table = bool(found) and all("window_rows" in tensors for tensors, *_ in found)
    state: dict[str, Any] = {}
    if resumed.options.metric == "adam":
        moment = state["second_moment"] = torch.zeros(shape, dtype=resumed.options.result_dtype)
        for tensors, part, (theirs, ours) in found:
            now = tensors["second_moment"]
            if "moment_steps" in tensors:
                now = as_of_now(now, tensors["moment_steps"], resumed.scaling(p, part.moment_step))
            moment[ours] = now[theirs]
    rows = []
    dtype = resumed.options.result_dtype if is_table else resumed.options.window_dtype
    window_M = torch.zeros(0 if is_table else num_grads, *shape, dtype=dtype)
    for row in range(num_grads):
        whole = torch.zeros(shape, dtype=dtype) if is_table else window_M[row]
        for tensors, part, (theirs, ours) in found:
            whole[ours] = _stored_row(tensors, part, row)[theirs].to(dtype)
        if is_table:
            rows.append(nonzero_rows(whole))
    return {**state, **(_table(rows, shape) if is_table else {"window": window_M})}


def _stored_row(tensors: Mapping[str, Tensor], part: Part, row: int) -> Tensor:
    """One of the stored gradients of a part, of its shape."""
    if "window" in tensors:
        return tensors["window"][row]
    used = tensors["window_rows"][row] < part.shape[0]
    rows = SparseRows(tensors["window_rows"][row, used], tensors["window_values"][row, used])
    return rows.to_dense(torch.Size(part.shape))


def _table(rows_M: Sequence[SparseRows], shape: Sequence[int]) -> dict[str, Tensor]:
    """Gradients of a table as `RowSparseColumns` has them."""
    slots = max(1, *(len(rows) for rows, _ in rows_M))
    rows_MN = torch.full((len(rows_M), slots), shape[0], dtype=torch.int64)
    values_MNH = torch.zeros(len(rows_M), slots, shape[1], dtype=rows_M[0].values.dtype)
    for row, (rows, values) in enumerate(rows_M):
        rows_MN[row, : len(rows)], values_MNH[row, : len(rows)] = rows, values
    return {"window_rows": rows_MN, "window_values": values_MNH}


def _place_as_before(states: Mapping[Tensor, dict[str, Any]], own: Mapping[Tensor, Sequence[Part]]) -> None:
    """Give each parameter the place in its store that it had."""
    stores = sorted({(sources[0].store, sources[0].rank) for sources in own.values()})
    for p, (part, *_) in own.items():
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
