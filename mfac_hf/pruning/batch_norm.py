"""Statistics of batch norms that are averaged anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["averaging_anew", "batch_norms", "check_batch_norms"]


def check_batch_norms(model: nn.Module, count: int) -> None:
    """Raise ValueError for a model without statistics to average over ``count`` examples, if that is not 0."""
    if count and not batch_norms(model):
        raise ValueError(f"batch_norm_samples is {count}, and {type(model).__name__} has no batch norm: leave it out")


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a model that keep statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@contextmanager
def averaging_anew(model: nn.Module) -> Iterator[None]:
    """Inside the block, each call of the model in training mode counts equally in the statistics of its batch norms.

    What they were before is forgotten. The batch norms are in training mode inside the block, and in the mode that
    they had after it; other modules stay as they are.
    """
    norms = batch_norms(model)
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.training = True
    try:
        yield
    finally:
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum, norm.training = momentum, training
