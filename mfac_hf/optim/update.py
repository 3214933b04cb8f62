"""Moving the parameters along their directions: weight decay, momentum, and the step itself.

Those that `plan_moves` names may be moved in the pass over the window that gives their directions; `apply_directions`
moves the others.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mfac_hf.fisher.columns import Part
from mfac_hf.optim.second_moment import Move
from mfac_hf.optim.sharded import local

__all__ = ["apply_directions", "order_moves", "plan_moves"]

HALF = (torch.float16, torch.bfloat16)


def plan_moves(
    groups: list[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]], dtype: torch.dtype
) -> dict[Tensor, Move]:
    """How the parameters move that need nothing but their directions: no momentum, mask, rounding or copy.

    Args:
        groups: parameter groups of the optimizer.
        states: of each parameter.
        dtype: of directions.
    """
    moves = {}
    for group in groups:
        if group.get("momentum", 0.0):
            continue
        lr = float(group["lr"])
        factor = 1 - lr * group["weight_decay"] if group.get("decoupled_weight_decay", True) else 1.0
        for p in group["params"]:
            target = local(p)
            if target.dtype == dtype and target.is_contiguous() and "mask" not in states.get(p, ()):
                moves[p] = Move(target, factor, lr)
    return moves


def order_moves(
    members: Iterable[Tensor],
    gradients: Collection[Tensor],
    moves: Mapping[Tensor, Move],
    device: torch.device,
) -> list[Move | None] | None:
    """The moves of the parameters that share a store, or None if one of them needs its direction.

    Args:
        members: the parameters, in the order of the store's columns.
        gradients: parameters that have one.
        moves: of those that `plan_moves` names.
        device: of the store.

    Returns:
        In the order of the members; None for one without a gradient.
    """
    members = list(members)
    if any(p in gradients and (p not in moves or p.device != device) for p in members):
        return None
    return [moves[p] if p in gradients else None for p in members]


def apply_directions(
    groups: list[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]], directions: Mapping[Tensor, Part]
) -> None:
    r"""Move each parameter that has a direction u: :math:`\theta \leftarrow (1 - \eta\delta)\theta - \eta v`.

    v is u, or with momentum :math:`\mu` the average :math:`v \leftarrow \mu v + (1 - \mu) u`; :math:`\delta` is the
    decoupled weight decay, which leaves masked coordinates alone.

    Args:
        groups: parameter groups of the optimizer.
        states: of each parameter; momentum_buffer is brought up to date.
        directions: a tensor of the parameter's shape, or the rows of a table that are not zero.
    """
    for group in groups:
        lr, momentum = group["lr"], group.get("momentum", 0.0)
        decay = lr * group["weight_decay"] if group.get("decoupled_weight_decay", True) else 0.0
        dense_moved, dense_directions = [], []
        for p in group["params"] if directions else ():
            if p not in directions:
                continue
            state, direction, target = states[p], directions[p], local(p)
            if decay:
                _shrink_weights(target, decay, state.get("mask"))
            if momentum:
                direction = _average(state, direction, momentum, p)
            if target.dtype in HALF:
                _move_half(target, direction, lr)
            elif isinstance(direction, Tensor):
                dense_moved.append(target)
                dense_directions.append(direction.to(p.dtype))
            else:
                target.index_add_(0, direction.rows, direction.values.to(p.dtype), alpha=-lr)
        if dense_moved:
            torch._foreach_add_(dense_moved, dense_directions, alpha=-lr)


def _move_half(target: Tensor, direction: Part, lr: Any) -> None:
    """Move a parameter of 16 bits, rounding the result alone: a direction may be larger than float16 can hold."""
    if isinstance(direction, Tensor):
        target.add_(direction, alpha=-lr)
    else:
        rows, values = direction
        target.index_copy_(0, rows, target[rows].to(values.dtype).add_(values, alpha=-lr).to(target.dtype))


def _shrink_weights(target: Tensor, decay: Any, mask: Tensor | None) -> None:
    if mask is None:
        target.mul_(1 - decay)
    else:
        target.copy_(torch.where(mask.to(target.device), target * (1 - decay), target))


def _average(state: dict[str, Any], direction: Part, momentum: float, p: Tensor) -> Tensor:
    """The exponential average of the directions, with this one taken in."""
    if "momentum_buffer" not in state:
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        state["momentum_buffer"] = torch.zeros_like(p, dtype=dtype)
    buffer = local(state["momentum_buffer"])
    if isinstance(direction, Tensor):
        return buffer.lerp_(direction.to(buffer.dtype), 1 - momentum)
    values = direction.values.to(buffer.dtype)
    return buffer.mul_(momentum).index_add_(0, direction.rows, values, alpha=1 - momentum)
