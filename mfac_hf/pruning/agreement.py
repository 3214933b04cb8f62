"""Agreement of ranks that prune copies of the same model: the first one decides, and where one fails, all do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["failing_together", "follow_first_rank", "of_first_rank", "sum_over_ranks"]


@contextmanager
def failing_together(group: dist.ProcessGroup | None, what: str) -> Iterator[None]:
    """Let every rank leave the block with an exception where one does, instead of waiting for it in the next exchange.

    Args:
        group: the ranks, all of which come here; without a group, this is no more than the block.
        what: what the block does, for the message. It must not communicate.

    Raises:
        RuntimeError: another rank failed, with its number and its reason; or a rank has ended without a word.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    reasons: list[str | None] = []
    if group is not None:
        own = None if failure is None else f"{type(failure).__name__}: {failure}"
        reasons = [None] * group.size()
        try:
            dist.all_gather_object(reasons, own, group=group)
        except RuntimeError as error:
            if failure is None:
                raise RuntimeError(
                    f"another rank ended, or did not answer in time, {what} ({str(error).splitlines()[0]})"
                ) from error
    if failure is not None:
        raise failure
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise RuntimeError(f"rank {rank} failed {what}: {reason}")


def of_first_rank(value: Any, group: dist.ProcessGroup | None) -> Any:
    """Return the value that the first rank passed, which has to be picklable; without a group, this value."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def sum_over_ranks(value: float, device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Return the sum of the values that the ranks passed; without a group, this value."""
    if group is None:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return float(total)


def follow_first_rank(
    weights: Mapping[str, Tensor], keep: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Overwrite weights and bool masks with those of the first rank: another machine may have rounded differently."""
    if group is None:
        return
    for name in weights:
        dist.broadcast(weights[name], group=group, group_src=0)
        bits = keep[name].to(weights[name].device, torch.uint8)
        dist.broadcast(bits, group=group, group_src=0)
        keep[name].copy_(bits)
