"""One sub-step of pruning: from the weights, masks and gradients of a model to new weights and masks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mfac_hf.fisher import BlockedFisher
from mfac_hf.machine import GIB, available_bytes
from mfac_hf.pruning import obs
from mfac_hf.pruning.agreement import sum_over_ranks
from mfac_hf.pruning.damping import SWEEP, Proposal, Target, candidates
from mfac_hf.pruning.gradients import GradientSource
from mfac_hf.pruning.options import PruningOptions
from mfac_hf.pruning.patterns import Pattern

__all__ = ["magnitude_step", "mfac_step", "plan_groups"]


def plan_groups(
    sizes: Mapping[str, int], options: PruningOptions, device: torch.device, *, shared: bool = False
) -> list[list[str]]:
    """Divide targets into groups whose Fishers fit into memory together.

    Args:
        sizes: weights of each target, by name.
        options: block size, number of gradients and budget.
        device: where the Fishers will be.
        shared: whether ranks add up their sums, for which each of them needs whole blocks.

    Raises:
        MemoryError: a single target exceeds the budget; the message has the numbers and the ways out.
    """
    assert options.block_size is not None  # full_step has no blocks
    budget = options.memory_budget
    if budget is None:
        # New weights, costs and the backward passes need room as well.
        budget = available_bytes(device) // 2 if device.type in ("cpu", "cuda") else sys.maxsize
    num_grads = max(options.num_grads, options.block_size) if shared else options.num_grads
    groups: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        needed = BlockedFisher.nbytes(size, options.block_size, num_grads)
        if needed > budget:
            raise MemoryError(
                f"the Fisher of {name} ({size:,} weights in blocks of {options.block_size}, {options.num_grads} "
                f"gradients) needs {needed / GIB:.3f} GiB, and the budget on {device} is {budget / GIB:.3f} GiB. Ways "
                "out: a smaller block_size, fewer num_grads than block_size, or a larger memory_budget"
            )
        if needed > left or not groups:
            groups.append([])
            left = budget
        groups[-1].append(name)
        left -= needed
    return groups


def magnitude_step(
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    targets: Sequence[Target],
    options: PruningOptions,
) -> list[Proposal]:
    """Remove the smallest weights, leaving the others alone; arguments and result are those of :func:`mfac_step`."""
    pattern = Pattern.parse(options.pattern)
    weights, kept = _flat(parameters, masks)
    costs = {name: obs.magnitude_costs(weights[name], kept[name], pattern) for name in weights}
    proposals = [Proposal(target, {}, _select(costs, kept, target, pattern)) for target in targets]
    for proposal in proposals:
        proposal.weights = {name: weights[name].masked_fill(~keep, 0) for name, keep in proposal.keep.items()}
    return proposals


def mfac_step(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    targets: Sequence[Target],
    options: PruningOptions,
    *,
    source: GradientSource,
    groups: list[list[str]],
    seed: int,
    advance: Callable[[int], None],
    dampings: Sequence[float] = (),
    relative_dampings: Sequence[float] = SWEEP,
) -> list[Proposal]:
    """Remove the weights that the Fisher says cost least, and move the others to make up for it.

    With several groups of targets each is visited twice, with the same gradients: for the costs of its weights and,
    when all costs are known and the weights chosen, for the update. The model does not change in between.

    Args:
        model: the model.
        parameters: the targets, by name.
        masks: which of their weights are left.
        targets: one or more sparsities to reach from here: over all tensors together, or in each by name. All of them
            are served by the same gradients and costs.
        options: how.
        source: of the gradients.
        groups: names of targets whose Fishers fit into memory together (:func:`plan_groups`).
        seed: of the gradients.
        advance: is told how many gradients were taken.
        dampings: to try; default that of the options.
        relative_dampings: to try for ``"auto"``, in units of the mean squared entry of a gradient.

    Returns:
        A proposal for each damping for which the Fisher can be inverted, and each target.

    Raises:
        ValueError: a loss or gradient that is not finite, or too few of them.
        FloatingPointError: the damping is too small for the Fisher to be inverted.
    """
    pattern = Pattern.parse(options.pattern)
    weights, kept = _flat(parameters, masks)
    scale = 0.0
    costs: dict[float, dict[str, Tensor]] = {}
    fishers: dict[str, BlockedFisher] = {}

    def visit(names: list[str]) -> float:
        fishers.clear()  # before there are others
        found, mean_square = _fishers(
            model, {name: parameters[name] for name in names}, kept, options, source, seed, advance
        )
        fishers.update(found)
        return mean_square

    for names in groups:
        mean_square = visit(names)
        if not costs:
            scale = mean_square
            costs = {damping: {} for damping in dampings or candidates(options, scale, relative_dampings)}
        for damping in list(costs):
            try:
                for name in names:
                    costs[damping][name] = _costs(weights[name], kept[name], fishers[name], damping, options, pattern)
            except FloatingPointError:
                del costs[damping]
                if not costs:
                    raise
    proposals = [
        Proposal(
            target, {}, _select(of_damping, kept, target, pattern), damping, 0.0, damping / scale if scale else None
        )
        for damping, of_damping in costs.items()
        for target in targets
    ]
    for names in groups:
        if len(groups) > 1:
            visit(names)
        for proposal in proposals:
            for name in names:
                _update(proposal, name, weights[name], kept[name], fishers[name], options, pattern)
    return proposals


def _fishers(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    kept: Mapping[str, Tensor],
    options: PruningOptions,
    source: GradientSource,
    seed: int,
    advance: Callable[[int], None],
) -> tuple[dict[str, BlockedFisher], float]:
    """Fisher of each parameter, and the mean squared entry of a gradient; pruned weights count for nothing."""
    assert options.block_size is not None  # full_step has no blocks
    fishers = {
        name: BlockedFisher(
            p.numel(),
            block_size=options.block_size,
            damping=1.0,
            num_grads=options.num_grads,
            device=p.device,
            process_group=source.process_group,
        )
        for name, p in parameters.items()
    }
    last = next(reversed(fishers))
    everything = {name: bool(kept[name].all()) for name in fishers}
    total = 0.0

    def add(name: str, rows: Tensor) -> None:
        nonlocal total
        if not everything[name]:
            rows = rows * kept[name]
        fishers[name].add(rows)
        total += float(torch.linalg.vector_norm(rows)) ** 2
        if name == last:
            advance(len(rows))

    source.collect(model, parameters, options.num_grads, seed, add)
    total = sum_over_ranks(total, parameters[last].device, source.process_group)
    left = sum(int(kept[name].sum()) for name in parameters)
    return fishers, total / (options.num_grads * max(left, 1))


def _costs(
    weights_D: Tensor, kept_D: Tensor, fisher: BlockedFisher, damping: float, options: PruningOptions, pattern: Pattern
) -> Tensor:
    fisher.damping = damping
    costs = obs.greedy_costs if options.selection == "greedy" else obs.diagonal_costs
    return costs(weights_D, kept_D, fisher, pattern)


def _select(
    costs: dict[str, Tensor],
    kept: dict[str, Tensor],
    target: Target,
    pattern: Pattern,
) -> dict[str, Tensor]:
    if not isinstance(target, Mapping):
        return obs.select(costs, kept, target, pattern=pattern)
    return {
        name: obs.select({name: costs[name]}, kept, sparsity, pattern=pattern, scope="uniform")[name]
        for name, sparsity in target.items()
    }


def _update(
    proposal: Proposal,
    name: str,
    weights_D: Tensor,
    kept_D: Tensor,
    fisher: BlockedFisher,
    options: PruningOptions,
    pattern: Pattern,
) -> None:
    """Add the new weights of one target to a proposal, and what they cost."""
    assert proposal.damping is not None and proposal.predicted_loss_increase is not None
    fisher.damping, keep_D = proposal.damping, proposal.keep[name]
    if options.update == "joint":
        moved_D = obs.joint_update(weights_D, kept_D, keep_D, fisher)
    else:
        moved_D = obs.summed_update(weights_D, kept_D, keep_D, fisher, pattern)
    proposal.weights[name] = moved_D
    proposal.predicted_loss_increase += quadratic_loss(moved_D - weights_D, fisher)


def quadratic_loss(step_D: Tensor, fisher: BlockedFisher) -> float:
    r""":math:`\tfrac12 \delta^\top F \delta`, the loss increase that the Fisher expects of a step."""
    total = 0.0
    for first, last in fisher.chunks():
        step_KB = torch.zeros(last - first, fisher.block_size, dtype=torch.float64, device=fisher.device)
        part_D = step_D[first * fisher.block_size : last * fisher.block_size]
        step_KB.view(-1)[: len(part_D)] = part_D
        total += 0.5 * float(torch.einsum("ki,kij,kj->", step_KB, fisher.matrices(first, last), step_KB))
    return total


def _flat(
    parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights (float32; pruned ones zero) and masks as vectors on the parameters' device."""
    kept = {name: masks[name].to(p.device).flatten() for name, p in parameters.items()}
    weights = {name: p.detach().flatten().float().masked_fill(~kept[name], 0) for name, p in parameters.items()}
    return weights, kept
