"""Parameters that lie in shards or copies on several ranks: each rank steps what it has, and the window is one.

FSDP2 and tensor parallelism place a parameter on a mesh of ranks, sharded along some of its dimensions and copied
along the others; beside it there may be ordinary parameters, with a copy on every rank. Each rank keeps the columns of
what it has. The dot products of the window are summed over the ranks, so each number counts on one rank alone: of
copies, those on the first ranks of their mesh.
"""

import sys
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Layout", "box_of", "check_counted_once", "is_sharded", "local", "layout_of"]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is placed on a mesh of ranks, as FSDP2 and tensor parallelism do."""
    # Importing the module takes a second; where nobody has, there are no such tensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """What this rank has of a tensor that is placed on a mesh; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


class Layout(NamedTuple):
    """How the parameters lie on the ranks that step together.

    Attributes:
        group: these ranks.
        kinds: of each parameter, what those that are placed alike have in common. They share stores, so that copies
            are stored and combined in the same way, to the bit, on every rank.
        copies: parameters of which this rank has a copy that does not count.
        everywhere: ordinary parameters, whose gradients have to be the same on every rank.
    """

    group: dist.ProcessGroup
    kinds: dict[Tensor, Hashable]
    copies: frozenset[Tensor]
    everywhere: frozenset[Tensor]


def layout_of(parameters: Mapping[str, Any], sharing: dist.ProcessGroup | None) -> Layout | None:
    """How parameters lie on the ranks; None if none of them is placed on a mesh. No rank waits for another.

    Args:
        parameters: those that are trained, by what an error calls them.
        sharing: ranks that share a window of whole parameters.

    Raises:
        ValueError: names the parameter that is placed in a way that cannot be counted.
    """
    placed = {name: p for name, p in parameters.items() if is_sharded(p)}
    if not placed:
        return None
    widest, mesh = max(((name, p.device_mesh) for name, p in placed.items()), key=lambda item: item[1].size())
    ranks = mesh.mesh.flatten().tolist()
    kinds: dict[Tensor, Hashable] = {}
    copies, everywhere = set(), set()
    for name, p in parameters.items():
        found = None
        if sharing is not None:
            found = f"{widest} is placed on a mesh of ranks, with process_group={sharing}"
        elif name not in placed:
            kinds[p], counted = None, dist.get_rank() == ranks[0]
            everywhere.add(p)
        elif any(placement.is_partial() for placement in p.placements):
            found = f"{name} is placed as {p.placements}: its ranks have terms of a sum"
        else:
            own, coordinates = p.device_mesh.mesh.flatten().tolist(), p.device_mesh.get_coordinate() or []
            copied = tuple(placement.is_replicate() for placement in p.placements)
            kinds[p] = (tuple(own), copied)
            counted = ranks[0] in own and not any(c for c, along in zip(coordinates, copied, strict=True) if along)
            if not set(own) <= set(ranks):
                found = f"{name} lies on the ranks {own}, and {widest} on {ranks}"
        if found:
            raise ValueError(f"{found}. {_WAYS_OUT}")
        if not counted:
            copies.add(p)
    return Layout(_group(mesh, widest), kinds, frozenset(copies), frozenset(everywhere))


_WAYS_OUT = (
    "MFAC takes parameters that FSDP2 or tensor parallelism has placed on one mesh (of all ranks, if it has several "
    "dimensions), ordinary ones beside them, and no process_group; or whole ones under DistributedDataParallel"
)


def _group(mesh: Any, name: str) -> dist.ProcessGroup:
    """The ranks of a mesh as a process group."""
    if mesh.size() == dist.get_world_size():
        world = dist.group.WORLD
        assert world is not None
        return world
    if mesh.ndim == 1:
        group: dist.ProcessGroup = mesh.get_group()
        return group
    raise ValueError(
        f"{name} lies on a mesh of {mesh.ndim} dimensions and {mesh.size()} of {dist.get_world_size()} ranks. "
        f"{_WAYS_OUT}"
    )


def check_counted_once(parameters: Mapping[str, Any], layout: Layout) -> None:
    """See that each number of each parameter counts on one rank; all ranks of the layout call this.

    Raises:
        ValueError: on every rank; names the first parameter for which that is not so.
    """
    counted = [0 if p in layout.copies else local(p).numel() for p in parameters.values()]
    device = local(next(iter(parameters.values()))).device
    totals = torch.tensor(counted, dtype=torch.int64, device=device)
    dist.all_reduce(totals, group=layout.group)
    for (name, p), total in zip(parameters.items(), totals.tolist(), strict=True):
        if total != p.numel():
            raise ValueError(f"{name} has {p.numel()} numbers, and the ranks together count {total}. {_WAYS_OUT}")


def box_of(p: Any) -> tuple[int, ...]:
    """Where in the whole parameter this rank's part of it begins, in each dimension."""
    if not is_sharded(p):
        return (0,) * p.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(int(start) for start in offset)
