"""Agreement of ranks that prune copies of the same model: the first one decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["follow_first_rank", "of_first_rank", "sum_over_ranks"]


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
