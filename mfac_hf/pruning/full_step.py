r"""One sub-step of pruning with the Fisher of all targets together, without blocks.

The gradients of the weights that are left are kept in host memory, m x d, and worked on in pages of columns
(`mfac_hf.fisher.full`). All weights are ranked by :math:`w_i^2 / (2 [F^{-1}]_{ii})`: a greedy trace through one block
of all weights would take d downdates of d numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mfac_hf.fisher.full import FullFisher
from mfac_hf.machine import GIB, available_bytes
from mfac_hf.pruning import obs
from mfac_hf.pruning.damping import Proposal
from mfac_hf.pruning.gradients import GradientSource
from mfac_hf.pruning.options import PruningOptions
from mfac_hf.pruning.patterns import Pattern

__all__ = ["full_step"]


def full_step(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    sparsity: Mapping[str, float] | float,
    options: PruningOptions,
    *,
    source: GradientSource,
    seed: int,
    advance: Callable[[int], None],
) -> Proposal:
    """Remove the weights that the whole Fisher says cost least, and move the others to make up for it.

    Args:
        model: the model.
        parameters: the targets, by name.
        masks: which of their weights are left.
        sparsity: to reach, over all targets together.
        options: how; ``block_size`` is None.
        source: of the gradients.
        seed: of the gradients.
        advance: is told how many gradients were taken.

    Raises:
        MemoryError: the gradients do not fit into host memory.
        ValueError: a loss or gradient that is not finite, or too few of them; a source whose ranks take a share each.
        FloatingPointError: the damping is too small for the Fisher to be inverted.
    """
    assert not isinstance(sparsity, Mapping) and not isinstance(options.damping, str)  # PruningOptions
    if source.process_group is not None:
        raise ValueError("without blocks (block_size None) every rank needs all gradients: a source without a group")
    kept = {name: masks[name].flatten() for name in parameters}
    at = {name: keep.nonzero().squeeze(1) for name, keep in kept.items()}
    sizes = [len(index) for index in at.values()]
    fisher = FullFisher(
        _collect(model, parameters, at, options, source, seed, advance),
        damping=options.damping,
        page_size=-(-sum(sizes) // options.pages),
        device=next(iter(parameters.values())).device,
    )
    weights_D = torch.cat([parameters[name].detach().flatten()[index].cpu() for name, index in at.items()])
    diagonal_D = fisher.inverse_diagonal()
    costs = {name: torch.full(keep.shape, float("inf")) for name, keep in kept.items()}
    for name, cost_D in zip(at, (weights_D.square() / (2 * diagonal_D)).split(sizes), strict=True):
        costs[name][at[name].cpu()] = cost_D
    on_host = {name: keep.cpu() for name, keep in kept.items()}
    keep = obs.select(costs, on_host, sparsity, pattern=Pattern.parse("unstructured"))
    stays_D = torch.cat([keep[name][index.cpu()] for name, index in at.items()])
    if options.update == "joint":
        moved_D = fisher.joint_update(weights_D, torch.ones_like(stays_D), stays_D)
    else:
        pull_D = torch.where(stays_D, 0, weights_D / diagonal_D)
        moved_D = (weights_D - fisher.solve(pull_D)).masked_fill(~stays_D, 0)
    change_D = moved_D - weights_D
    slope_M = fisher.grads_MD @ change_D
    increase = 0.5 * (fisher.damping * change_D.square().sum() + slope_M.square().mean())
    new = {}
    for name, values_D in zip(at, moved_D.split(sizes), strict=True):
        new[name] = torch.zeros(kept[name].shape, device=parameters[name].device, dtype=parameters[name].dtype)
        new[name][at[name]] = values_D.to(new[name])
    keep = {name: mask.to(parameters[name].device) for name, mask in keep.items()}
    return Proposal(sparsity, new, keep, fisher.damping, increase.item())


def _collect(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    at: Mapping[str, Tensor],
    options: PruningOptions,
    source: GradientSource,
    seed: int,
    advance: Callable[[int], None],
) -> Tensor:
    """Gradients of the weights at the given places, (m, d) in host memory, float32."""
    dim = sum(len(index) for index in at.values())
    needed, free = 4 * options.num_grads * dim, available_bytes(torch.device("cpu"))
    if needed > free:
        raise MemoryError(
            f"{options.num_grads} gradients of {dim:,} weights take {needed / GIB:.1f} GiB of host memory, and "
            f"{free / GIB:.1f} are free. Ways out: fewer num_grads, fewer targets, or blocks (block_size=128)"
        )
    grads_MD = torch.empty(options.num_grads, dim)
    places, start = {}, 0
    for name, index in at.items():
        places[name] = slice(start, start + len(index))
        start += len(index)
    filled = dict.fromkeys(at, 0)
    last = next(reversed(filled))

    def keep(name: str, rows: Tensor) -> None:
        rows = rows[:, at[name]]
        grads_MD[filled[name] : filled[name] + len(rows), places[name]] = rows.cpu()
        filled[name] += len(rows)
        if name == last:
            advance(len(rows))

    source.collect(model, parameters, options.num_grads, seed, keep)
    return grads_MD
