"""Mixtures of experts: the weights of all experts in one tensor of three dimensions, and the routers that choose them.

transformers keeps the matrices of E experts as (E, out, in), multiplied as a linear layer's, or as (E, in, out). For
pruning they are E matrices: rows of weights of one output, expert after expert. A block of the Fisher may begin in the
last row of one expert and end in the first of the next, as it may in any two rows: its matrix is the exact one of
these weights all the same, and where B divides the size of a matrix there is no such block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

__all__ = ["expert_weights", "router_weights", "whole_experts"]

_ROUTERS = ("router", "gate", "shared_expert_gate")


def expert_weights(model: nn.Module) -> dict[nn.Parameter, bool]:
    """Find the weights of experts, and say of each whether it is stored as (E, in, out).

    They are the parameters of three dimensions, but for biases, of modules whose class is named after experts, as
    ``MixtralExperts`` and all others of transformers are.
    """
    return {
        parameter: _by_inputs(module)
        for module in model.modules()
        if "Experts" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and not name.endswith("bias")
    }


def _by_inputs(module: nn.Module) -> bool:
    """Return whether the experts' matrices are stored as (in, out)."""
    said = getattr(module, "is_transposed", None)  # by the decorator of transformers
    if isinstance(said, bool):
        return said
    up, down = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    # Gate and up together have twice the outputs that down has inputs.
    return up is not None and down is not None and up.shape[2] == 2 * down.shape[1]


def router_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of what stands beside experts and decides how much of each a token gets.

    They are few, and where a router changes its mind the loss jumps, which no quadratic model of it foresees.
    """
    experts = expert_weights(model)
    for module in model.modules():
        children = dict(module.named_children())
        own = (p for child in children.values() for p in child.parameters(recurse=False))
        if "experts" in children or any(parameter in experts for parameter in own):
            for name in _ROUTERS:
                if name in children:
                    yield from children[name].parameters()


def whole_experts(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Find the experts of whose matrix a mask keeps nothing: {parameter name: experts}."""
    experts = expert_weights(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    gone = {
        name: (~keep.flatten(1).any(1)).nonzero().flatten().tolist()
        for name, keep in masks.items()
        if named[name] in experts
    }
    return {name: found for name, found in gone.items() if found}
