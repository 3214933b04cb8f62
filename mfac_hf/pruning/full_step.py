r"""One sub-step of pruning with the Fisher of all targets together, without blocks.

The gradients of the weights that are left lie in host memory, m x d, and are worked on in pages of columns
(`mfac_hf.fisher.full`). The cost of a weight is :math:`w_i^2 / (2 [F^{-1}]_{ii})`, as if it went alone: a greedy trace
through one block of all weights would take d downdates of d numbers.

Shape suffixes: M gradients, D weights that are left in all targets together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mfac_hf.fisher.full import FullFisher
from mfac_hf.machine import GIB, available_bytes
from mfac_hf.pruning import obs
from mfac_hf.pruning.damping import Dampings
from mfac_hf.pruning.gradient_source import GradientSet
from mfac_hf.pruning.options import PruningOptions
from mfac_hf.pruning.patterns import Pattern
from mfac_hf.pruning.proposal import Level, Proposal

__all__ = ["full_step"]


def full_step(
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    level: Level,
    options: PruningOptions,
    gradients: GradientSet,
) -> Proposal:
    """Remove the weights that the whole Fisher says cost least, and move the others to make up for them.

    Args:
        parameters: the targets, by name.
        masks: masks of the weights that are left.
        level: the sparsity to reach, over all targets together.
        options: options of the pruning; ``block_size`` is None.
        gradients: gradients that the Fisher is the average of.

    Raises:
        MemoryError: the gradients do not fit into host memory.
        ValueError: a loss or gradient that is not finite, or too few gradients.
        FloatingPointError: the damping is too small for the Fisher to be inverted.
    """
    assert not isinstance(level, Mapping)  # PruningOptions
    kept = {name: masks[name].flatten() for name in parameters}
    at = {name: keep.nonzero().squeeze(1) for name, keep in kept.items()}
    dim = sum(len(index) for index in at.values())
    grads_MD = _collect(parameters, at, gradients)
    (damping,) = Dampings.of_options(options).absolute(
        float(torch.linalg.vector_norm(grads_MD)) ** 2 / grads_MD.numel()
    )
    fisher = FullFisher(
        grads_MD,
        damping=damping,
        page_size=-(-dim // options.pages),
        device=next(iter(parameters.values())).device,
    )
    weights_D = torch.cat([parameters[name].detach().flatten()[index].cpu() for name, index in at.items()])
    diagonal_D = fisher.inverse_diagonal()
    keep = _select(weights_D.square() / (2 * diagonal_D), kept, at, level)
    stays_D = torch.cat([keep[name][index.cpu()] for name, index in at.items()])
    if options.update == "joint":
        moved_D = fisher.joint_update(weights_D, torch.ones_like(stays_D), stays_D)
    elif options.update == "none":
        moved_D = weights_D.masked_fill(~stays_D, 0)
    else:
        pull_D = torch.where(stays_D, 0, weights_D / diagonal_D)
        moved_D = (weights_D - fisher.solve(pull_D)).masked_fill(~stays_D, 0)
    change_D = moved_D - weights_D
    slope_M = fisher.grads_MD @ change_D
    increase = 0.5 * (fisher.damping * change_D.square().sum() + slope_M.square().mean())
    keep = {name: mask.to(parameters[name].device) for name, mask in keep.items()}
    return Proposal(level, _spread(moved_D, parameters, at), keep, fisher.damping, increase.item())


def _select(
    costs_D: Tensor, kept: Mapping[str, Tensor], at: Mapping[str, Tensor], sparsity: float
) -> dict[str, Tensor]:
    """Return new masks in host memory, by name: the cheapest of the weights that are left go."""
    costs = {name: torch.full(keep.shape, float("inf")) for name, keep in kept.items()}
    sizes = [len(index) for index in at.values()]
    for name, part_D in zip(at, costs_D.split(sizes), strict=True):
        costs[name][at[name].cpu()] = part_D
    on_host = {name: keep.cpu() for name, keep in kept.items()}
    return obs.select(costs, on_host, sparsity, pattern=Pattern.parse("unstructured"))


def _spread(values_D: Tensor, parameters: Mapping[str, nn.Parameter], at: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a flat tensor like each parameter: the values at their places, zeros elsewhere."""
    spread = {}
    for (name, index), part_D in zip(at.items(), values_D.split([len(index) for index in at.values()]), strict=True):
        parameter = parameters[name]
        spread[name] = torch.zeros(parameter.numel(), device=parameter.device, dtype=parameter.dtype)
        spread[name][index] = part_D.to(spread[name])
    return spread


def _collect(parameters: Mapping[str, nn.Parameter], at: Mapping[str, Tensor], gradients: GradientSet) -> Tensor:
    """Return the gradients of the weights at the given places, (m, d) in host memory, float32."""
    dim, num_grads = sum(len(index) for index in at.values()), gradients.num_grads
    needed, free = 4 * num_grads * dim, available_bytes(torch.device("cpu"))
    if needed > free:
        raise MemoryError(
            f"{num_grads} gradients of {dim:,} weights take {needed / GIB:.1f} GiB of host memory, and "
            f"{free / GIB:.1f} are free. Ways out: fewer num_grads, fewer targets, or blocks "
            f"(block_size={PruningOptions.block_size})"
        )
    grads_MD = torch.empty(num_grads, dim)
    places, start = {}, 0
    for name, index in at.items():
        places[name] = slice(start, start + len(index))
        start += len(index)
    filled = dict.fromkeys(at, 0)

    def keep(name: str, rows: Tensor) -> None:
        rows = rows[:, at[name]]
        grads_MD[filled[name] : filled[name] + len(rows), places[name]] = rows.cpu()
        filled[name] += len(rows)

    gradients.collect(parameters, keep)
    return grads_MD
