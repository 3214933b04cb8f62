"""Parameters that FSDP2 has sharded: each rank steps its shard, and the ranks' windows make up one."""

import sys
from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["is_sharded", "local", "shard_group"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP2 has sharded a tensor."""
    # Importing the module takes a second; where nobody has, there are no such tensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """This rank's shard of a tensor that FSDP2 has sharded; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def shard_group(parameter: Any, sharing: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The ranks over which FSDP2 has sharded a parameter; None if it has not.

    Args:
        parameter: one of the parameters, which are all sharded alike.
        sharing: ranks that share a window of whole parameters.

    Raises:
        ValueError: for a device mesh of several dimensions, or together with ``sharing``.
    """
    if not is_sharded(parameter):
        return None
    if sharing is not None or parameter.device_mesh.ndim != 1:
        raise ValueError(
            f"parameters sharded over a device mesh of {parameter.device_mesh.ndim} dimensions, with process_group="
            f"{sharing}: MFAC takes FSDP2's shards over a mesh of one dimension, without process_group"
        )
    return parameter.device_mesh.get_group()
