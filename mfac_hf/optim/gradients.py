"""Gradients as the window takes them: weight decay included, this rank's shards alone, and finite."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.fisher.options import MAX_NORM
from mfac_hf.optim.sharded import local

__all__ = ["are_finite", "read_gradients"]


def read_gradients(groups: list[dict[str, Any]]) -> dict[Tensor, Tensor]:
    """Gradient of each parameter that has one (this rank's shard of it), coupled weight decay included.

    Raises:
        ValueError: for a sparse gradient that is not row-sparse.
    """
    gradients = {}
    for group in groups:
        decay = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
        for p in group["params"]:
            if p.grad is None:
                continue
            grad = p.grad
            if grad.is_sparse and (p.ndim != 2 or grad.sparse_dim() != 1):
                raise ValueError(
                    f"a sparse gradient with {grad.sparse_dim()} sparse dimensions for a parameter of shape "
                    f"{tuple(p.shape)}; MFAC takes the row-sparse ones of torch.nn.Embedding(sparse=True)"
                )
            gradients[p] = local(p).mul(decay).add_(local(grad)) if decay else local(grad)
    return gradients


def are_finite(gradients: dict[Tensor, Tensor], group: dist.ProcessGroup | None) -> bool:
    """Whether the sum of the gradients' norms is at most `MAX_NORM`, over all ranks of the group."""
    values = [grad.coalesce().values() if grad.is_sparse else grad for grad in gradients.values()]
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
    total = torch.stack(torch._foreach_norm(values, 2, dtype=dtype)).sum()
    if group is not None:  # all ranks skip, or none
        dist.all_reduce(total, group=group)
    return bool(total <= MAX_NORM)  # false for NaN
