"""Automatic damping: several are tried, and the loss on held-out examples decides.

A Fisher whose gradients are accumulated takes any damping afterwards, so that one set of gradients serves all trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mfac_hf.pruning.gradients import GradientSource
from mfac_hf.pruning.options import PruningOptions

__all__ = ["SWEEP", "Proposal", "Target", "best_proposal", "candidates", "write_weights"]

# Dampings that "auto" tries, in units of the mean squared entry of a gradient.
SWEEP = (1e-3, 1e-2, 1e-1, 1.0, 10.0)

Target = Mapping[str, float] | float


@dataclass
class Proposal:
    """New weights and masks, flat, by parameter name.

    Attributes:
        target: the sparsity: of all tensors together, or of each by name.
        weights: exactly zero where they are pruned.
        keep: the masks.
        damping: that the Fisher had; None without one.
        predicted_loss_increase: what the quadratic model of the loss expects; None without one.
        relative_damping: the damping in units of the mean squared entry of a gradient.
    """

    target: Target
    weights: dict[str, Tensor]
    keep: dict[str, Tensor]
    damping: float | None = None
    predicted_loss_increase: float | None = None
    relative_damping: float | None = None


def candidates(options: PruningOptions, mean_square: float, relative: Sequence[float]) -> list[float]:
    """The damping of the options, or for ``"auto"`` these multiples of the mean squared entry of a gradient."""
    if not isinstance(options.damping, str):
        return [options.damping]
    if mean_square == 0:
        raise ValueError("all gradients are zero, so that no damping is better than another: give a number")
    return [factor * mean_square for factor in relative]


def best_proposal(
    model: nn.Module, parameters: dict[str, nn.Parameter], proposals: list[Proposal], source: GradientSource | None
) -> tuple[Proposal, list[dict[str, float | None]]]:
    """Of several dampings the proposal whose has the lowest held-out loss at the last target, and all of these losses.

    The model is left as the last one would be.
    """
    judged = [proposal for proposal in proposals if proposal.target == proposals[-1].target]
    if len(judged) == 1:
        return proposals[0], []
    assert source is not None
    losses = []
    for proposal in judged:
        try:
            write_weights(parameters, proposal.weights)
            loss = source.loss(model)
        except FloatingPointError:
            loss = None
        losses.append(loss if loss is not None and math.isfinite(loss) else math.inf)
    damping = judged[min(range(len(losses)), key=losses.__getitem__)].damping
    shown = [
        {"damping": proposal.damping, "loss": loss if math.isfinite(loss) else None}
        for proposal, loss in zip(judged, losses, strict=True)
    ]
    return next(proposal for proposal in proposals if proposal.damping == damping), shown


def write_weights(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    """Put new weights into the model.

    Raises:
        FloatingPointError: one is not finite; nothing is written then.
    """
    if wrong := [name for name, values in weights.items() if not bool(torch.isfinite(values).all())]:
        raise FloatingPointError(f"the new weights of {wrong[0]} are not finite: raise the damping")
    for name, values in weights.items():
        parameters[name].copy_(values.view_as(parameters[name]))
