"""Gradients as the window takes them: weight decay included, this rank's shards alone, finite, on all ranks alike."""

import zlib
from array import array
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.fisher.options import MAX_NORM
from mfac_hf.optim.groups import labels
from mfac_hf.optim.sharded import is_sharded, local

__all__ = ["are_finite", "read_gradients"]

# Ranks with the same gradients have the same norms, to the last bits: a share of the norm that is none of rounding.
NORM_TOLERANCE = 1e-3


def read_gradients(groups: list[dict[str, Any]]) -> dict[Tensor, Tensor]:
    """Gradient of each parameter that has one (what this rank has of it), coupled weight decay included.

    A gradient on a mesh of ranks that is placed in another way than its parameter is placed like it, for which the
    ranks wait for each other.

    Raises:
        ValueError: for a sparse gradient that is not row-sparse, gradients on several devices, or one on a mesh
            whose parameter is not on it, and the other way round.
    """
    gradients = {}
    for group in groups:
        decay = 0.0 if group.get("decoupled_weight_decay", True) else group["weight_decay"]
        for p in group["params"]:
            if p.grad is None:
                continue
            grad = p.grad
            if is_sharded(grad) or is_sharded(p):
                grad = _placed_like(p, grad, groups)
            if grad.is_sparse and (p.ndim != 2 or grad.sparse_dim() != 1):
                raise ValueError(
                    f"a sparse gradient with {grad.sparse_dim()} sparse dimensions for a parameter of shape "
                    f"{tuple(p.shape)}; MFAC takes the row-sparse ones of torch.nn.Embedding(sparse=True)"
                )
            gradients[p] = local(p).mul(decay).add_(local(grad)) if decay else local(grad)
    devices = {grad.device for grad in gradients.values()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"gradients on several devices ({names}); move the model to one device")
    return gradients


def _placed_like(p: Any, grad: Any, groups: list[dict[str, Any]]) -> Any:
    """The gradient of a parameter on a mesh, placed as the parameter is."""
    if is_sharded(p) and is_sharded(grad) and p.device_mesh == grad.device_mesh:
        return grad if grad.placements == p.placements else grad.redistribute(placements=p.placements)
    number = next(i for i, q in enumerate(q for group in groups for q in group["params"]) if q is p)
    raise ValueError(
        f"{labels(groups)[number]} lies on {getattr(p, 'device_mesh', 'no mesh')}, and its gradient on "
        f"{getattr(grad, 'device_mesh', 'no mesh')}; expected both on one mesh of ranks"
    )


def are_finite(
    gradients: dict[Tensor, Tensor],
    groups: list[dict[str, Any]],
    ranks: dist.ProcessGroup | None,
    *,
    alike: Collection[Tensor] = (),
) -> bool:
    """Whether the sum of the gradients' norms is at most `MAX_NORM`, over all ranks.

    What the ranks have to agree about goes with the norm, so that no second message is needed.

    Args:
        gradients: by parameter.
        groups: parameter groups of the optimizer.
        ranks: those that step together.
        alike: the parameters whose gradients are whole and the same on each.

    Raises:
        ValueError: on every rank, if they have gradients for other parameters, or, where they should be alike, of
            another norm; it names the first parameter.
    """
    values = [grad.coalesce().values() if grad.is_sparse else grad for grad in gradients.values()]
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
    norms = list(torch._foreach_norm(values, 2, dtype=dtype)) if values else []
    if ranks is None:
        return bool(torch.stack(norms).sum() <= MAX_NORM)  # false for NaN
    parameters = [p for group in groups for p in group["params"]]
    present = [position for position, p in enumerate(parameters) if p in gradients]
    code = zlib.crc32(array("q", [len(parameters), *present]).tobytes())
    # Numbers are the same on all ranks if their mean square is the square of their mean; float64 sums are exact here.
    codes = torch.tensor([code >> 16, (code >> 16) ** 2, code & 0xFFFF, (code & 0xFFFF) ** 2], dtype=torch.float64)
    device = local(parameters[0]).device
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    norm = torch.stack(norms).sum().double() if norms else nothing
    same = {p: one for p, one in zip(gradients, norms, strict=True) if p in alike}
    alike_norm = torch.stack(list(same.values())).sum().double() if same else nothing
    sums = torch.cat([torch.stack([norm, alike_norm, alike_norm.square()]), codes.to(device)])
    dist.all_reduce(sums, group=ranks)
    total, alike_total, squares = sums[:3].tolist()
    high, high_squares, low, low_squares = (int(figure) for figure in sums[3:].tolist())
    size = dist.get_world_size(ranks)
    if size * high_squares != high**2 or size * low_squares != low**2:
        raise ValueError(_other_parameters(present, groups, ranks))
    finite = total <= MAX_NORM
    if finite and squares / size - (alike_total / size) ** 2 > (NORM_TOLERANCE * alike_total / size) ** 2:
        raise ValueError(_other_norms(same, groups, ranks))
    return finite


def _other_norms(norms: dict[Tensor, Tensor], groups: list[dict[str, Any]], ranks: dist.ProcessGroup) -> str:
    """Which gradient differs between ranks where all should have the same; all of them call this."""
    everywhere: list[Any] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(everywhere, [float(norm) for norm in norms.values()], group=ranks)
    spread = [max(values) - min(values) for values in zip(*everywhere, strict=True)]
    first = spread.index(max(spread))
    names = dict(zip((p for group in groups for p in group["params"]), labels(groups), strict=True))
    return (
        f"the ranks have gradients of other norms: that of {names[list(norms)[first]]} is "
        f"{', '.join(f'{values[first]:.6g}' for values in everywhere)}. It is whole on each rank and has to be the "
        "same: wrap the model in DistributedDataParallel, or reduce such gradients before the step (FSDP2 leaves "
        "those of ignored_params as they are)"
    )


def _other_parameters(present: list[int], groups: list[dict[str, Any]], ranks: dist.ProcessGroup) -> str:
    """What differs between ranks that have gradients for other parameters; all of them call this."""
    names = labels(groups)
    everywhere: list[Any] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(everywhere, (len(names), present), group=ranks)
    if len({count for count, _ in everywhere}) > 1:
        return f"the ranks have optimizers of {[count for count, _ in everywhere]} parameters; expected the same ones"
    sets = [set(positions) for _, positions in everywhere]
    first = min(set.union(*sets) - set.intersection(*sets))
    having = [rank for rank, positions in enumerate(sets) if first in positions]
    return (
        f"{names[first]} has a gradient on ranks {having} alone: ranks that step together need gradients for the same "
        "parameters. Give zeros where a layer was skipped (p.grad = torch.zeros_like(p)), as DistributedDataParallel "
        "with find_unused_parameters=True does"
    )
