"""Proposals of a sub-step of pruning: new weights and masks of the targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Level", "Proposal", "write_weights"]

# A sparsity of all targets together, or of each by name.
Level = Mapping[str, float] | float


@dataclass
class Proposal:
    """New weights and masks, flat, by parameter name.

    Attributes:
        level: the sparsity that they have.
        weights: exactly zero where they are pruned.
        keep: the masks.
        damping: damping of the Fisher; None without one.
        predicted_loss_increase: what the quadratic model of the loss expects; None without one.
        relative_damping: the damping in units of the mean squared entry of a gradient; None where it is not known.
    """

    level: Level
    weights: dict[str, Tensor]
    keep: dict[str, Tensor]
    damping: float | None = None
    predicted_loss_increase: float | None = None
    relative_damping: float | None = None


def write_weights(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    """Put new weights into the model.

    Raises:
        FloatingPointError: one is not finite; nothing is written then.
    """
    if wrong := [name for name, values in weights.items() if not bool(torch.isfinite(values).all())]:
        raise FloatingPointError(f"the new weights of {wrong[0]} are not finite: raise the damping")
    for name, values in weights.items():
        parameters[name].copy_(values.view_as(parameters[name]))
