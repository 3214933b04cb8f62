"""What a rank needs of a gradient window that others have written or hold, and how it gets that from their parts.

A part that is what a rank needs is taken as it is; others are cut to size, one parameter at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.fisher.columns import SparseRows
from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.placement import nonzero_rows
from mfac_hf.optim.second_moment import Scaling, as_of_now
from mfac_hf.optim.sharded import Layout, box_of, local
from mfac_hf.optim.sharing import Owner, assign_owners
from mfac_hf.optim.window_folder import HeldWindow, Part, WindowFolder

__all__ = ["Need", "Resumed", "needs_of", "owners_of", "slices", "states_of"]


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


class Need(NamedTuple):
    """What this rank is to have of a parameter.

    Attributes:
        sources: the parts that have it.
        offset: where it begins in the parameter.
        shape: of it.
        mask: of the whole parameter, where it has one.
    """

    sources: list[Part]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    mask: Tensor | None

    @property
    def box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where it lies in the parameter."""
        return self.offset, self.shape

    @property
    def is_there(self) -> bool:
        """Whether one part is what is needed."""
        return self.sources[0].box == self.box

    def own_mask(self) -> Tensor | None:
        """The mask of what is needed."""
        return None if self.mask is None else self.mask[slices(*self.box)]


def slices(offset: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Where a box lies, as an index."""
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def owners_of(source: WindowFolder | HeldWindow, resumed: Resumed) -> dict[Tensor, Owner]:
    """Who keeps each parameter's columns: as before where as many ranks share the window, else dealt out anew."""
    parameters, sharing = resumed.parameters, resumed.sharing
    held = {parameters[number]: sum(map(source.nbytes, found)) for number, found in source.parts.items()}
    if sharing is None or not source.is_shared or source.ranks != dist.get_world_size(sharing):
        return assign_owners(held, {}, resumed.masks, sharing)
    owners = {}
    for number, found in source.parts.items():
        p, rows, bounds = parameters[number], {part.rank: part.shape[0] if part.shape else 1 for part in found}, [0]
        for rank in range(source.ranks):
            bounds.append(bounds[-1] + max(1, rows[rank]) if rank in rows else bounds[-1])
        owners[p] = Owner(tuple(bounds), p.shape, held[p])
    return owners


def needs_of(
    source: WindowFolder | HeldWindow, resumed: Resumed, owners: Mapping[Tensor, Owner]
) -> dict[Tensor, Need]:
    """What this rank is to have of each parameter of which it is to have anything."""
    rank = 0 if resumed.sharing is None else dist.get_rank(resumed.sharing)
    needs = {}
    for number, p in enumerate(resumed.parameters):
        if p not in owners or not owners[p].holds(rank):
            continue
        box = (box_of(p), tuple(local(p).shape)) if resumed.sharing is None else owners[p].box(rank)
        found = source.parts[number]
        same = [part for part in found if part.box == box]
        over = [part for part in found if part.overlap(box)]
        needs[p] = Need(same[:1] or over or found[:1], *box, resumed.masks.get(p))  # any one for an empty box
    return needs


def states_of(
    source: WindowFolder | HeldWindow, needs: Mapping[Tensor, Need], resumed: Resumed
) -> dict[Tensor, dict[str, Any]]:
    """What this rank's state is to have of each of its parameters."""
    names = {p: source.names(need.sources[0]) for p, need in needs.items() if need.is_there}
    tensors = source.read([entry for entries in names.values() for entry in entries.values()])
    states: dict[Tensor, dict[str, Any]] = {}
    for p, need in needs.items():
        if p in names:
            states[p] = {name: tensors[entry] for name, entry in names[p].items()}
        else:
            states[p] = _assembled(source, need, p, resumed)
    return states


def _assembled(source: WindowFolder | HeldWindow, need: Need, p: Tensor, resumed: Resumed) -> dict[str, Any]:
    """What this rank needs of a parameter, from parts of other boxes: dense, unless all of them are tables."""
    found = [(source.read_part(part), part, places) for part in need.sources if (places := part.overlap(need.box))]
    is_table = bool(found) and all("window_rows" in tensors for tensors, *_ in found)
    own_mask, options = need.own_mask(), resumed.options
    state: dict[str, Any] = {}
    if options.metric == "adam":
        moment = torch.zeros(need.shape, dtype=options.result_dtype, device=p.device)
        for tensors, part, (theirs, ours) in found:
            now = tensors["second_moment"]
            if "moment_steps" in tensors:
                now = as_of_now(now, tensors["moment_steps"], resumed.scaling(p, part.moment_step))
            moment[ours] = _spread(now, part, need.mask)[theirs].to(p.device)
        state["second_moment"] = moment if is_table or own_mask is None else moment[own_mask]
    rows = []
    dtype = options.result_dtype if is_table else options.window_dtype
    size = need.shape if own_mask is None else (int(own_mask.sum()),)
    window_M = torch.zeros(0 if is_table else options.num_grads, *size, dtype=dtype)
    for row in range(options.num_grads):
        whole = torch.zeros(need.shape, dtype=dtype)
        for tensors, part, (theirs, ours) in found:
            whole[ours] = _stored_row(tensors, part, row, need.mask)[theirs].to(whole)
        if is_table:
            rows.append(nonzero_rows(whole))
        else:
            window_M[row] = whole if own_mask is None else whole[own_mask.cpu()]
    return {**state, **(_table(rows, need.shape) if is_table else {"window": window_M})}


def _spread(values: Tensor, part: Part, mask: Tensor | None) -> Tensor:
    """Numbers of a part, of its shape: those that its mask left out are zero."""
    if mask is None or tuple(values.shape) == part.shape:
        return values
    whole = values.new_zeros(part.shape)
    whole[mask[slices(*part.box)].to(values.device)] = values
    return whole


def _stored_row(tensors: Mapping[str, Tensor], part: Part, row: int, mask: Tensor | None) -> Tensor:
    """One of the stored gradients of a part, of its shape."""
    if "window" in tensors:
        return _spread(tensors["window"][row], part, mask)
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
