"""The damping: a number, one relative to the gradients, or several of them, among which a held-out loss decides.

A Fisher takes any damping after its gradients are accumulated, so one set of gradients serves all trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mfac_hf.defaults import RELATIVE_PRUNING_DAMPING
from mfac_hf.pruning.gradient_source import GradientSource
from mfac_hf.pruning.options import PruningOptions
from mfac_hf.pruning.proposal import Proposal, write_weights

__all__ = ["SWEEP", "Dampings", "best_proposal"]

# Dampings that "auto" tries, in units of the mean squared entry of a gradient.
SWEEP = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Dampings:
    """The dampings that a sub-step tries.

    Attributes:
        values: one or more positive numbers.
        relative: whether they count in units of the mean squared entry of a gradient.
    """

    values: tuple[float, ...]
    relative: bool = False

    @classmethod
    def of_options(cls, options: PruningOptions) -> Dampings:
        """Make the damping of the options, the scaled Fisher's default for None, or for ``"auto"`` all of `SWEEP`."""
        if isinstance(options.damping, str):
            return cls(SWEEP, relative=True)
        if options.damping is None:
            return cls((RELATIVE_PRUNING_DAMPING,), relative=True)
        return cls((options.damping,))

    def absolute(self, mean_square: float) -> list[float]:
        """Return the numbers to add to the Fisher's diagonal, given the mean squared entry of a gradient.

        Raises:
            ValueError: they are relative to gradients that are all zero.
        """
        if not self.relative:
            return list(self.values)
        if mean_square == 0:
            raise ValueError("all gradients are zero, so that no damping is better than another: give a number")
        return [factor * mean_square for factor in self.values]

    def after(self, chosen: Proposal) -> Dampings:
        """Return what later sub-steps try: relative dampings narrow down to the chosen one."""
        if not self.relative or chosen.relative_damping is None:
            return self
        return Dampings((chosen.relative_damping,), relative=True)


def best_proposal(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    proposals: Sequence[Proposal],
    source: GradientSource | None,
) -> tuple[Proposal, list[dict[str, float | None]]]:
    """Choose the damping by the held-out loss that the model has with it at the last level.

    The model is left with the weights of the last trial. A single damping is not tried.

    Args:
        model: the model.
        parameters: its targets, by name.
        proposals: one for each damping at each level; every damping has the levels in the same order.
        source: source of the held-out loss; None will do for a single damping.

    Returns:
        The proposal at the first level with the chosen damping, and what was tried: ``damping`` and ``loss`` of each,
        the loss being None where it was not finite.
    """
    judged = [proposal for proposal in proposals if proposal.level == proposals[-1].level]
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
    tried = [
        {"damping": proposal.damping, "loss": loss if math.isfinite(loss) else None}
        for proposal, loss in zip(judged, losses, strict=True)
    ]
    return next(proposal for proposal in proposals if proposal.damping == damping), tried
