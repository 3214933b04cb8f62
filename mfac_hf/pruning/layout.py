"""The order in which the weights of a target stand in a vector.

Patterns run along the inputs of an output. A layer that stores its weight as (in, out), as ``Conv1D`` does, has the
outputs of an input side by side instead, so for a pattern its weight is transposed into the vector, and back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mfac_hf.pruning.patterns import Pattern
from mfac_hf.pruning.proposal import Proposal

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Row-major order, but for the targets that are transposed.

    Attributes:
        transposed: (in, out) of each of these, by name.
    """

    transposed: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, parameters: Mapping[str, nn.Parameter], by_inputs: Collection[str], pattern: Pattern) -> Layout:
        """Make the layout for a pattern; single weights may stand in any order, and stay in their own.

        Args:
            parameters: the targets, by name.
            by_inputs: names of those that are stored as (in, out).
            pattern: the pattern.
        """
        names = by_inputs if pattern.span > 1 else ()
        return cls({name: (parameters[name].shape[0], parameters[name].shape[1]) for name in names})

    def flat(self, name: str, tensor: Tensor) -> Tensor:
        """Return a weight, or its mask, as a vector."""
        return (tensor.T if name in self.transposed else tensor).flatten()

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Return flat gradients, n x numel, in the order of the vectors."""
        if name not in self.transposed:
            return rows
        return rows.unflatten(1, self.transposed[name]).transpose(1, 2).flatten(1)

    def restore(self, proposal: Proposal) -> None:
        """Bring new weights and masks back into the order of their parameters."""
        for name, (inputs, outputs) in self.transposed.items():
            for vectors in (proposal.weights, proposal.keep):
                vectors[name] = vectors[name].view(outputs, inputs).T.flatten()
