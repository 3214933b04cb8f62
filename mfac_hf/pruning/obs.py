r"""Optimal Brain Surgeon on flat tensors: costs of pruning, selection, and the update of what is left.

With the quadratic model of the loss around trained weights, :math:`\tfrac12 \delta^\top F \delta`, removing the set Q
and moving the survivors S as well as possible costs :math:`\tfrac12 w_Q^\top ([F^{-1}]_{QQ})^{-1} w_Q`.

1. *Costs*, one for each unit of the pattern (a weight, or a group that goes together), are infinite for units that are
   pruned already or have to stay: `magnitude_costs`, `diagonal_costs` (each unit as if it went alone, the paper's
   saliency :math:`w_i^2 / (2 [F^{-1}]_{ii})`) or `greedy_costs`.
2. `select` takes the cheapest units up to a sparsity. Costs are computed once and serve every sparsity.
3. `joint_update` moves the survivors to the exact minimum of the quadratic model; `summed_update` is the paper's.

The greedy trace removes one unit after the other in each block, always the cheapest given all earlier removals, and
downdates the inverse each time. The cost of a unit is the largest loss increment up to its removal; hence the cheapest
units of all blocks together are the first ones of each block's trace.

Sources: Frantar, Kurtic and Alistarh, "Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS
2021; the trace follows Frantar, Singh and Alistarh, "Optimal Brain Compression", NeurIPS 2022, on Fisher blocks; the
joint cost of a group is also in Kurtic et al., "The Optimal BERT Surgeon", EMNLP 2022.

Shape suffixes: D weights of a tensor, U units of a tensor, K blocks, B block size, G units of a block.
"""

from typing import get_args

import torch
from torch import Tensor

from mfac_hf.fisher.blocked import BlockedFisher
from mfac_hf.fisher.definite import inverse_blocks, solve_blocks
from mfac_hf.fisher.full import FullFisher
from mfac_hf.pruning.options import Scope
from mfac_hf.pruning.patterns import Pattern
from mfac_hf.pruning.trace import diagonal_units, kept_units, trace_blocks, unit_costs

__all__ = [
    "SCOPES",
    "descent_direction",
    "diagonal_costs",
    "greedy_costs",
    "joint_update",
    "magnitude_costs",
    "select",
    "summed_update",
]

SCOPES = get_args(Scope)

# A trace in float32 keeps three digits where downdating shrinks no diagonal entry by more than this factor.
FLOAT32_SHRINKAGE = 2e3


def magnitude_costs(weights_D: Tensor, keep_D: Tensor, pattern: Pattern) -> Tensor:
    """Return the sum of squared weights of each unit: shape (units,), float32; infinite for pruned units."""
    _check_flat(weights_D, keep_D)
    costs_U = weights_D.detach().double().square().view(-1, pattern.unit).sum(dim=1).float()
    return pattern.restrict(costs_U.masked_fill(~kept_units(keep_D, pattern), float("inf")))


def diagonal_costs(weights_D: Tensor, keep_D: Tensor, fisher: BlockedFisher | FullFisher, pattern: Pattern) -> Tensor:
    r"""Return the cost of each unit as if it went alone: shape (units,), float32; infinite for pruned units.

    :math:`\tfrac12 w_Q^\top ([F^{-1}]_{QQ})^{-1} w_Q`; for single weights :math:`w_i^2 / (2 [F^{-1}]_{ii})`.

    A full Fisher serves single weights only, and its gradients have to be zero where weights are pruned.

    Raises:
        ValueError: shapes differ, or the pattern has groups and the Fisher is full.
        FloatingPointError: a block is not positive definite.
    """
    _check_flat(weights_D, keep_D, fisher)
    if isinstance(fisher, FullFisher):
        _check_single(pattern)
        costs_D = weights_D.detach().double().square() / (2 * fisher.inverse_diagonal().to(weights_D.device).double())
        return pattern.restrict(costs_D.float().masked_fill(~keep_D, float("inf")))
    parts = []
    for first, last in fisher.chunks():
        weights_KB, keep_KB = _cut(weights_D, keep_D, fisher, first, last)
        inverse_KBB = inverse_blocks(fisher.matrices(first, last, keep_KB))
        costs_KG = unit_costs(diagonal_units(inverse_KBB, pattern.unit), weights_KB.unflatten(1, (-1, pattern.unit)))
        parts.append(costs_KG.flatten())
    costs_U = torch.cat(parts)[: len(weights_D) // pattern.unit].float()
    return pattern.restrict(costs_U.masked_fill(~kept_units(keep_D, pattern), float("inf")))


def greedy_costs(weights_D: Tensor, keep_D: Tensor, fisher: BlockedFisher, pattern: Pattern) -> Tensor:
    """Return the cost of each unit in the greedy trace of its block: shape (units,), float32.

    Within a block, costs increase strictly in the order of removal. They are infinite for units that have to stay.

    Raises:
        ValueError: shapes differ.
        FloatingPointError: a block is not positive definite.
    """
    _check_flat(weights_D, keep_D, fisher)
    parts = []
    for first, last in fisher.chunks():
        weights_KB, keep_KB = _cut(weights_D, keep_D, fisher, first, last)
        fisher_KBB = fisher.matrices(first, last, keep_KB)
        inverse_KBB = inverse_blocks(fisher_KBB)
        shrinkage = (fisher_KBB.diagonal(dim1=1, dim2=2) * inverse_KBB.diagonal(dim1=1, dim2=2)).max()
        if shrinkage <= FLOAT32_SHRINKAGE:
            inverse_KBB, weights_KB = inverse_KBB.float(), weights_KB.float()
        parts.append(trace_blocks(inverse_KBB, weights_KB, keep_KB, pattern).flatten())
    return torch.cat(parts)[: len(weights_D) // pattern.unit]


def select(
    costs: dict[str, Tensor], keep: dict[str, Tensor], sparsity: float, *, pattern: Pattern, scope: Scope = "global"
) -> dict[str, Tensor]:
    """Return masks at a sparsity: the cheapest units go, besides those that are pruned already.

    Of units with the same cost the first ones go.

    Args:
        costs: {name: (units,)} from one of the functions above.
        keep: {name: bool, (d,)} what is kept so far.
        sparsity: share of zeros afterwards: exactly ``round(sparsity * d)`` weights (to whole units), over all tensors
            together or in each.
        pattern: the pattern that the costs were computed for.
        scope: ``"global"`` ranks all tensors together, ``"uniform"`` ranks each alone.

    Returns:
        {name: bool, (d,)}: new masks.

    Raises:
        ValueError: a sparsity outside [0, 1), below what is pruned already or above what the pattern allows, or an
            unknown scope.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity is {sparsity!r}; expected a number from 0 up to, not including, 1")
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; expected one of {', '.join(map(repr, SCOPES))}")
    if scope == "uniform":
        return {name: _select(f"in {name}", {name: costs[name]}, keep, sparsity, pattern)[name] for name in costs}
    return _select("over all targets", costs, keep, sparsity, pattern)


def _select(
    where: str, costs: dict[str, Tensor], keep: dict[str, Tensor], sparsity: float, pattern: Pattern
) -> dict[str, Tensor]:
    total = sum(keep[name].numel() for name in costs)
    pruned = total - sum(int(keep[name].sum()) for name in costs)
    budget = round(round(sparsity * total) / pattern.unit) - pruned // pattern.unit
    if budget < 0:
        raise ValueError(
            f"sparsity is {sparsity:g}, but {pruned} of {total} weights {where} ({pruned / total:.4g}) are pruned "
            "already and stay so: ask for more"
        )
    flat_U = torch.cat(list(costs.values()))
    possible = int(flat_U.isfinite().sum())
    if budget > possible:
        raise ValueError(
            f"sparsity is {sparsity:g}; the pattern {pattern.name!r} allows at most "
            f"{(pruned + possible * pattern.unit) / total:.6g} {where}"
        )
    goes_U = torch.zeros_like(flat_U, dtype=torch.bool)
    if budget:
        threshold = flat_U.kthvalue(budget).values
        goes_U = flat_U < threshold
        ties = (flat_U == threshold).nonzero().squeeze(1)
        goes_U[ties[: budget - int(goes_U.sum())]] = True
    parts = goes_U.split([len(cost_U) for cost_U in costs.values()])
    return {name: keep[name] & ~part.repeat_interleave(pattern.unit) for name, part in zip(costs, parts, strict=True)}


def joint_update(weights_D: Tensor, keep_D: Tensor, new_keep_D: Tensor, fisher: BlockedFisher | FullFisher) -> Tensor:
    r"""Return the weights after removing Q = keep & ~new_keep at once: :math:`\delta_S = F_{SS}^{-1} F_{SQ} w_Q`.

    They are the exact minimum of the quadratic model over the survivors S, in each block (a full Fisher is one).

    Returns:
        Shape (d,), in the dtype of ``weights_D``; exactly zero where ``new_keep_D`` is False.

    Raises:
        ValueError: shapes differ.
        FloatingPointError: a block is not positive definite.
    """
    _check_flat(weights_D, keep_D, fisher)
    if isinstance(fisher, FullFisher):
        return fisher.joint_update(weights_D, keep_D, new_keep_D)
    parts = []
    for first, last in fisher.chunks():
        weights_KB, new_keep_KB = _cut(weights_D, new_keep_D, fisher, first, last)
        removed_KB = _cut(weights_D, keep_D & ~new_keep_D, fisher, first, last)[0]
        pull_KB = torch.bmm(fisher.matrices(first, last), removed_KB.unsqueeze(2)).squeeze(2) * new_keep_KB
        parts.append((weights_KB + solve_blocks(fisher.matrices(first, last, new_keep_KB), pull_KB)).flatten())
    return _write(parts, weights_D, new_keep_D)


def summed_update(
    weights_D: Tensor, keep_D: Tensor, new_keep_D: Tensor, fisher: BlockedFisher | FullFisher, pattern: Pattern
) -> Tensor:
    r"""Return the weights after the paper's update, :math:`-\sum_Q F^{-1} e_Q ([F^{-1}]_{QQ})^{-1} w_Q`.

    Each removed unit Q asks for its update as if it went alone; what units do to each other is left out. A full Fisher
    serves single weights only, and its gradients have to be zero where weights are pruned.

    Returns:
        Shape (d,), in the dtype of ``weights_D``; exactly zero where ``new_keep_D`` is False.

    Raises:
        ValueError: shapes differ, or the pattern has groups and the Fisher is full.
        FloatingPointError: a block is not positive definite.
    """
    _check_flat(weights_D, keep_D, fisher)
    if isinstance(fisher, FullFisher):
        _check_single(pattern)
        pull_D = weights_D.detach() * (keep_D & ~new_keep_D) / fisher.inverse_diagonal().to(weights_D.device)
        return _write([weights_D.detach() - fisher.solve(pull_D).to(weights_D.device)], weights_D, new_keep_D)
    parts = []
    for first, last in fisher.chunks():
        weights_KB, keep_KB = _cut(weights_D, keep_D, fisher, first, last)
        removed_KB = _cut(weights_D, keep_D & ~new_keep_D, fisher, first, last)[0]
        inverse_KBB = inverse_blocks(fisher.matrices(first, last, keep_KB))
        units_Uuu = diagonal_units(inverse_KBB, pattern.unit).flatten(0, 1)
        pull_KB = solve_blocks(units_Uuu, removed_KB.view(-1, pattern.unit)).view_as(removed_KB)
        parts.append((weights_KB - torch.bmm(inverse_KBB, pull_KB.unsqueeze(2)).squeeze(2)).flatten())
    return _write(parts, weights_D, new_keep_D)


def descent_direction(slope_D: Tensor, keep_D: Tensor, fisher: BlockedFisher) -> Tensor:
    r"""Return :math:`-F_{SS}^{-1} g_S` of the kept weights S: shape (d,), in the dtype of ``slope_D``, zero elsewhere.

    Args:
        slope_D: gradient of the loss, g.
        keep_D: bool, False where a weight is pruned.
        fisher: the Fisher, with the gradients of pruned weights or without.

    Raises:
        ValueError: shapes differ.
        FloatingPointError: a block is not positive definite.
    """
    _check_flat(slope_D, keep_D, fisher)
    parts = []
    for first, last in fisher.chunks():
        slope_KB, keep_KB = _cut(slope_D, keep_D, fisher, first, last)
        parts.append(solve_blocks(fisher.matrices(first, last, keep_KB), -slope_KB).flatten())
    return _write(parts, slope_D, keep_D)


def _check_single(pattern: Pattern) -> None:
    if pattern.unit > 1:
        raise ValueError(
            f"pattern is {pattern.name!r}, and the full Fisher serves single weights only: give a block_size that is "
            f"a multiple of {pattern.unit}"
        )


def _check_flat(weights_D: Tensor, keep_D: Tensor, fisher: BlockedFisher | FullFisher | None = None) -> None:
    expected = (fisher.dim if fisher is not None else weights_D.numel(),)
    if weights_D.shape != expected or keep_D.shape != expected or keep_D.dtype != torch.bool:
        raise ValueError(
            f"weights of shape {tuple(weights_D.shape)} and a mask of shape {tuple(keep_D.shape)} ({keep_D.dtype}); "
            f"expected flat tensors of {expected[0]} entries, the mask of torch.bool"
        )


def _cut(weights_D: Tensor, keep_D: Tensor, fisher: BlockedFisher, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Return weights (float64, zero where not kept) and mask of some blocks, (k, B) each; padding is not kept."""
    size = fisher.block_size
    keep_KB = torch.zeros(last - first, size, dtype=torch.bool, device=fisher.device)
    weights_KB = torch.zeros(last - first, size, dtype=torch.float64, device=fisher.device)
    part_D = keep_D[first * size : last * size]
    keep_KB.view(-1)[: len(part_D)] = part_D
    weights_KB.view(-1)[: len(part_D)] = weights_D.detach()[first * size : last * size]
    return weights_KB.masked_fill_(~keep_KB, 0), keep_KB


def _write(parts: list[Tensor], weights_D: Tensor, keep_D: Tensor) -> Tensor:
    flat_D = torch.cat(parts)[: len(weights_D)].to(weights_D.device, weights_D.dtype)
    return flat_D.masked_fill_(~keep_D, 0)
