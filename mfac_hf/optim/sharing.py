"""Ranks that share one window: who keeps the columns of which parameter, and how directions reach everybody.

All ranks have the same parameters and gradients, as under DistributedDataParallel. Each stores the columns of some
parameters only, of large ones some rows, and the window's dot products are summed over the ranks.
"""

from collections.abc import Collection, Hashable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.fisher.columns import Part
from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.placement import Placement, is_row_sparse, place
from mfac_hf.optim.second_moment import SavedMoment
from mfac_hf.optim.sharded import Layout

__all__ = ["SHARE_MIN_BYTES", "Owner", "assign_owners", "broadcast_directions", "cut_moments", "deal_out", "place_own"]

# From this size of a whole window on, Trainer's ranks share it by themselves. Below it the memory is little, and a
# step waits for the messages; above it a step with gloo on one machine was seen to take less time, too.
SHARE_MIN_BYTES = 16 << 20


# A parameter whose columns take more than this part of a rank's even share is divided among all ranks by its rows.
DIVIDED_FROM = 0.25


class Owner(NamedTuple):
    """Who keeps the columns of a parameter: one rank all of them, or each rank those of some rows.

    Attributes:
        bounds: rank r keeps the rows (along the first dimension) from ``bounds[r]`` to ``bounds[r + 1]``.
        shape: of the parameter.
        size: bytes of its columns and of their second moments.
    """

    bounds: tuple[int, ...]
    shape: torch.Size
    size: int

    @classmethod
    def whole(cls, shape: torch.Size, size: int = 0, rank: int = 0, ranks: int = 1) -> "Owner":
        """One rank keeps all."""
        return cls((0,) * (rank + 1) + (_rows(shape),) * (ranks - rank), shape, size)

    @classmethod
    def divided(cls, shape: torch.Size, size: int, ranks: int) -> "Owner":
        """Each rank keeps as many rows as any other, or one less."""
        return cls(tuple(_rows(shape) * r // ranks for r in range(ranks + 1)), shape, size)

    def holds(self, rank: int) -> bool:
        """Whether a rank keeps columns of it."""
        return self.bounds[rank] < self.bounds[rank + 1]

    def is_divided(self) -> bool:
        """Whether several ranks do."""
        return sum(map(self.holds, range(len(self.bounds) - 1))) > 1

    def load(self, rank: int) -> float:
        """Bytes that a rank keeps."""
        return self.size * (self.bounds[rank + 1] - self.bounds[rank]) / self.bounds[-1]

    def box(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where a rank's rows begin in the parameter, in each dimension, and their shape."""
        start, stop = self.bounds[rank : rank + 2]
        if stop - start == _rows(self.shape):
            return (0,) * len(self.shape), tuple(self.shape)
        return (start, *[0] * (len(self.shape) - 1)), (stop - start, *self.shape[1:])

    def cut(self, tensor: Tensor, rank: int) -> Tensor:
        """A rank's rows of a tensor of the parameter's shape, such as its gradient: a view, unless it is sparse."""
        start, stop = self.bounds[rank : rank + 2]
        if stop - start == _rows(self.shape):
            return tensor
        if not tensor.is_sparse:
            return tensor[start:stop]
        tensor = tensor.coalesce()
        rows, values = tensor.indices()[0], tensor.values()
        inside = (rows >= start) & (rows < stop)
        return torch.sparse_coo_tensor(
            (rows[inside] - start).unsqueeze(0), values[inside], self.box(rank)[1], is_coalesced=True
        )


def _rows(shape: torch.Size) -> int:
    """Rows of a parameter; one, where it has no dimension or no number."""
    return max(1, shape[0]) if shape else 1


def assign_owners(
    sizes: dict[Tensor, int],
    owners: dict[Tensor, Owner],
    masks: Collection[Tensor],
    group: dist.ProcessGroup | None,
) -> dict[Tensor, Owner]:
    """The owner of each new parameter: large ones are divided, the others go whole to the rank with the least so far.

    Every rank sees the same gradients, so all come to the same end.

    Args:
        sizes: bytes of the columns of the parameters that have no owner yet, second moments included.
        owners: of the other parameters.
        masks: parameters that have one; they stay whole.
        group: the ranks; None if there is only this one.
    """
    return deal_out(sizes, owners, masks, 1 if group is None else dist.get_world_size(group))


def deal_out(
    sizes: dict[Tensor, int], owners: dict[Tensor, Owner], masks: Collection[Tensor], ranks: int
) -> dict[Tensor, Owner]:
    """As `assign_owners`, for a number of ranks."""
    if ranks == 1:
        return {p: Owner.whole(p.shape, size) for p, size in sizes.items()}
    load = [sum(owner.load(rank) for owner in owners.values()) for rank in range(ranks)]
    share = (sum(load) + sum(sizes.values())) / ranks
    assigned = {}
    for p in sorted(sizes, key=lambda p: -sizes[p]):
        if sizes[p] > DIVIDED_FROM * share and _rows(p.shape) >= ranks > 1 and p not in masks:
            assigned[p] = Owner.divided(p.shape, sizes[p], ranks)
        else:
            assigned[p] = Owner.whole(p.shape, sizes[p], load.index(min(load)), ranks)
        load = [held + assigned[p].load(rank) for rank, held in enumerate(load)]
    return assigned


def place_own(
    new: dict[Tensor, Tensor],
    owners: dict[Tensor, Owner],
    masks: dict[Tensor, Tensor],
    options: ParameterWindowOptions,
    sharing: dist.ProcessGroup | None,
    layout: Layout | None,
    *,
    gram_bytes: int = 0,
) -> dict[Tensor, Placement]:
    """Columns for what is this rank's of new parameters; those that are placed alike share their stores."""
    rank = 0 if sharing is None else dist.get_rank(sharing)
    kinds: dict[Hashable, dict[Tensor, Tensor]] = {None: {}}
    for p, grad in new.items():
        if sharing is None:
            kinds.setdefault(None if layout is None else layout.kinds[p], {})[p] = grad
        elif owners[p].holds(rank):
            kinds[None][p] = owners[p].cut(grad, rank)
    tables = None if sharing is None else {p for p, grad in new.items() if is_row_sparse(grad, options)}
    devices = options.devices(next(iter(new.values())).device)
    placements: dict[Tensor, Placement] = {}
    for own in kinds.values():
        cut = {p: owners[p].cut(mask, rank) for p, mask in masks.items() if p in own}
        placements |= place(own, cut, options, devices, row_sparse=tables, gram_bytes=gram_bytes)
        gram_bytes = 0
    return placements


def cut_moments(
    moments: Mapping[Tensor, SavedMoment], owners: Mapping[Tensor, Owner], rank: int
) -> dict[Tensor, SavedMoment]:
    """What a rank keeps of the second moments that an earlier run left of whole parameters."""
    own = {}
    for p, (moment, steps, scaling) in moments.items():
        if p in owners and owners[p].holds(rank):
            steps = None if steps is None else owners[p].cut(steps, rank)
            own[p] = SavedMoment(owners[p].cut(moment, rank), steps, scaling)
    return own


def broadcast_directions(
    directions: dict[Tensor, Part],
    parameters: list[Tensor],
    owners: dict[Tensor, Owner],
    dtype: torch.dtype,
    group: dist.ProcessGroup,
) -> dict[Tensor, Part]:
    """Every parameter's direction on every rank: each rank broadcasts those of its own, all at once.

    Args:
        directions: of what this rank owns.
        parameters: all that have a direction, in the same order on each rank.
        owners: the owner of each.
        dtype: of the directions that come back, which are dense.
        group: the ranks.
    """
    pieces: dict[Tensor, list[Tensor]] = {p: [] for p in parameters}
    for rank in range(dist.get_world_size(group)):
        held = [p for p in parameters if owners[p].holds(rank)]
        if not held:
            continue
        shapes = [torch.Size(owners[p].box(rank)[1]) for p in held]
        if rank == dist.get_rank(group):
            flat = torch.cat([_dense(directions[p], shape) for p, shape in zip(held, shapes, strict=True)]).to(dtype)
        else:
            flat = torch.empty(sum(shape.numel() for shape in shapes), dtype=dtype, device=held[0].device)
        dist.broadcast(flat, group=group, group_src=rank)
        for p, piece in zip(held, flat.split([shape.numel() for shape in shapes]), strict=True):
            pieces[p].append(piece)
    return {p: (found[0] if len(found) == 1 else torch.cat(found)).view(p.shape) for p, found in pieces.items()}


def _dense(direction: Part, shape: torch.Size) -> Tensor:
    """A direction as a vector."""
    return (direction if isinstance(direction, Tensor) else direction.to_dense(shape)).reshape(-1)
