"""Targets whose Fishers fit into memory together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mfac_hf.fisher import BlockedFisher
from mfac_hf.machine import GIB
from mfac_hf.pruning.gradient_source import GradientSource
from mfac_hf.pruning.options import PruningOptions
from mfac_hf.pruning.passes import memory_budget

__all__ = ["plan_groups"]


def plan_groups(parameters: Mapping[str, Tensor], options: PruningOptions, source: GradientSource) -> list[list[str]]:
    """Divide targets into groups whose Fishers fit into memory together; without blocks there is one group.

    Args:
        parameters: the targets, by name.
        options: block size, number of gradients and budget.
        source: source of the gradients.

    Raises:
        MemoryError: a single target exceeds the budget; the message has the numbers and the ways out.
        ValueError: the Fisher has no blocks, and each rank takes a share of the gradients.
    """
    if options.block_size is None:
        if source.process_group is not None:
            raise ValueError(
                "without blocks (block_size None) every rank needs all gradients, and this source shares them among "
                "ranks: give a block_size, or a source without a process group"
            )
        return [list(parameters)]
    device = next(iter(parameters.values())).device
    budget = memory_budget(options.memory_budget, device, share=0.5)
    # Ranks that add up their sums hold whole blocks, however few the gradients.
    shared = source.process_group is not None
    num_grads = max(options.num_grads, options.block_size) if shared else options.num_grads
    groups: list[list[str]] = []
    left = 0
    for name, parameter in parameters.items():
        size = parameter.numel()
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
