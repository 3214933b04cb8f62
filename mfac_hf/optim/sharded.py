"""Parameters that FSDP2 has sharded: each rank steps its shard, and the ranks' windows make up one."""

import sys
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["is_sharded", "local", "shard_group"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is placed over ranks, as FSDP2 does."""
    # Importing the module takes a second; where nobody has, there are no such tensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """This rank's shard of a tensor that FSDP2 has sharded; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def shard_group(parameters: Mapping[str, Any], sharing: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The ranks over which FSDP2 has sharded the parameters; None if it has not.

    The dot products of the ranks' windows are added up. So each number of a parameter has to be on one rank alone.

    Args:
        parameters: those that are trained, by what an error calls them.
        sharing: ranks that share a window of whole parameters.

    Raises:
        ValueError: names the parameter that is placed in another way: ordinary beside sharded ones, on a mesh of
            several dimensions or another mesh, replicated, or together with ``sharing``.
    """
    sharded = {name: p for name, p in parameters.items() if is_sharded(p)}
    if not sharded:
        return None
    first, mesh = next((name, p.device_mesh) for name, p in sharded.items())
    for name, p in parameters.items():
        if name not in sharded:
            found = f"{name} is an ordinary tensor (one of ignored_params?), while {first} is sharded"
        elif sharing is not None or p.device_mesh.ndim != 1:
            found = f"{name} is sharded over a mesh of {p.device_mesh.ndim} dimensions, with process_group={sharing}"
        elif p.device_mesh != mesh:
            found = f"{name} is sharded over {p.device_mesh}, and {first} over {mesh}"
        elif not p.placements[0].is_shard():
            found = f"{name} is not sharded but {p.placements[0]}, on every rank"
        elif p.grad is not None and (not is_sharded(p.grad) or p.grad.placements != p.placements):
            found = f"the gradient of {name} is placed in another way than the parameter"
        else:
            continue
        raise ValueError(
            f"{found}. MFAC takes parameters that FSDP2 has sharded, all of them over one mesh of one dimension and "
            "without process_group; train with DistributedDataParallel and process_group=..., or shard every parameter"
        )
    return mesh.get_group()
