"""The optimizer and the model inside the wrappers that accelerate and torch put around them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["unwrap_model", "unwrap_optimizer"]


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer that ``optimizer`` wraps, or ``optimizer`` itself where it wraps none (also None).

    Trainer's callbacks are handed accelerate's ``AcceleratedOptimizer`` once training has begun, and the bare
    optimizer before.
    """
    return getattr(optimizer, "optimizer", optimizer)


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DistributedDataParallel, DataParallel and AveragedModel, in any order.

    A model that has no such wrapper comes back itself. Layers that are wrapped inside a model stay so.
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
    while True:
        compiled = model._modules.get("_orig_mod")  # the wrapper of torch.compile has no public class
        inner = model.module if isinstance(model, wrappers) else compiled
        if not isinstance(inner, nn.Module):
            return model
        model = inner
