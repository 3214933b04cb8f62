"""Ranks that share one window: who keeps the columns of which parameter, and how directions reach everybody.

All ranks have the same parameters and gradients, as under DistributedDataParallel. Each stores the columns of some
parameters only, and the window's dot products are summed over the ranks.
"""

from collections.abc import Hashable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.fisher.columns import Part
from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.placement import Placement, place
from mfac_hf.optim.sharded import Layout

__all__ = ["SHARE_MIN_BYTES", "Owner", "assign_owners", "broadcast_directions", "place_own"]

# From this size of a whole window on, Trainer's ranks share it by themselves. Below it the memory is little, and a
# step waits for the messages; above it a step with gloo on one machine was seen to take less time, too.
SHARE_MIN_BYTES = 16 << 20


class Owner(NamedTuple):
    """The rank that keeps a parameter's columns, and the bytes of them and of their second moments."""

    rank: int
    size: int


def assign_owners(
    sizes: dict[Tensor, int], owners: dict[Tensor, Owner], group: dist.ProcessGroup | None
) -> dict[Tensor, Owner]:
    """The owner of each new parameter: largest first, to the rank with the least so far.

    Every rank sees the same gradients, so all come to the same end.

    Args:
        sizes: bytes of the columns of the parameters that have no owner yet, second moments included.
        owners: of the other parameters.
        group: the ranks; None if there is only this one.
    """
    if group is None:
        return dict.fromkeys(sizes, Owner(0, 0))
    load = [0] * dist.get_world_size(group)
    for owner in owners.values():
        load[owner.rank] += owner.size
    assigned = {}
    for p in sorted(sizes, key=lambda p: -sizes[p]):
        assigned[p] = Owner(load.index(min(load)), sizes[p])
        load[assigned[p].rank] += sizes[p]
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
    """Columns for those new parameters that are this rank's; those that are placed alike share their stores."""
    rank = 0 if sharing is None else dist.get_rank(sharing)
    kinds: dict[Hashable, dict[Tensor, Tensor]] = {None: {}}
    for p, grad in new.items():
        if owners[p].rank == rank:
            kinds.setdefault(None if layout is None else layout.kinds[p], {})[p] = grad
    devices = options.devices(next(iter(new.values())).device)
    placements: dict[Tensor, Placement] = {}
    for own in kinds.values():
        placements |= place(own, masks, options, devices, gram_bytes=gram_bytes)
        gram_bytes = 0
    return placements


def broadcast_directions(
    directions: dict[Tensor, Part],
    parameters: list[Tensor],
    owners: dict[Tensor, Owner],
    dtype: torch.dtype,
    group: dist.ProcessGroup,
) -> dict[Tensor, Part]:
    """Every parameter's direction on every rank: each rank broadcasts those of its own, all at once.

    Args:
        directions: of the parameters that this rank owns.
        parameters: all that have a direction, in the same order on each rank.
        owners: the owner of each.
        dtype: of the directions that come back, which are dense.
        group: the ranks.
    """
    shared: dict[Tensor, Part] = {}
    for rank in range(dist.get_world_size(group)):
        owned = [p for p in parameters if owners[p].rank == rank]
        if not owned:
            continue
        sizes = [p.numel() for p in owned]
        if rank == dist.get_rank(group):
            flat = torch.cat([_dense(directions[p], p).reshape(-1).to(dtype) for p in owned])
        else:
            flat = torch.empty(sum(sizes), dtype=dtype, device=owned[0].device)
        dist.broadcast(flat, group=group, group_src=rank)
        shared.update({p: part.view(p.shape) for p, part in zip(owned, flat.split(sizes), strict=True)})
    return shared


def _dense(direction: Part, p: Tensor) -> Tensor:
    return direction if isinstance(direction, Tensor) else direction.to_dense(p.shape)
