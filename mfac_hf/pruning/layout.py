"""The order in which the weights of a target stand in a vector.

All weights of one output stand together, since patterns run along its inputs, and since those are the weights that a
block of the Fisher should have: their gradients are the inputs times one number. A layer that stores its weight as
(in, out), as ``Conv1D`` does, has the outputs of an input side by side instead, so its weight is transposed into the
vector, and back. The matrices of experts, (experts, out, in) or (experts, in, out), stand one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Size, Tensor, nn
from transformers.pytorch_utils import Conv1D

from mfac_hf.pruning.experts import expert_weights
from mfac_hf.pruning.proposal import Proposal

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """How the targets of a model are stored.

    Attributes:
        by_inputs: shapes of those that are stored as (in, out) or (experts, in, out), by name.
        experts: numbers of matrices in those that have several, by name.
    """

    by_inputs: Mapping[str, Size]
    experts: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Layout:
        """Make the layout of a model's targets, by name."""
        experts = expert_weights(model)
        by_inputs = {module.weight for module in model.modules() if isinstance(module, Conv1D)}
        by_inputs |= {parameter for parameter, transposed in experts.items() if transposed}
        return cls(
            {name: parameter.shape for name, parameter in parameters.items() if parameter in by_inputs},
            {name: len(parameter) for name, parameter in parameters.items() if parameter in experts},
        )

    def matrix(self, name: str, tensor: Tensor) -> Tensor:
        """Return a weight, or its mask, with all weights of one output in each row: (out, ...)."""
        tensor = tensor.mT if name in self.by_inputs else tensor
        return tensor.flatten(0, 1) if name in self.experts else tensor

    def flat(self, name: str, tensor: Tensor) -> Tensor:
        """Return a weight, or its mask, as a vector."""
        return self.matrix(name, tensor).flatten()

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Return flat gradients, n x numel, in the order of the vectors."""
        shape = self.by_inputs.get(name)
        return rows if shape is None else rows.unflatten(1, shape).mT.flatten(1)

    def restore(self, proposal: Proposal) -> None:
        """Bring new weights and masks back into the order of their parameters."""
        for name, shape in self.by_inputs.items():
            for vectors in (proposal.weights, proposal.keep):
                vectors[name] = vectors[name].view(*shape[:-2], shape[-1], shape[-2]).mT.flatten()
