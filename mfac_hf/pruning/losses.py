"""The loss of a batch, as the model returns it or as a function computes it, and what of it can be used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfac_hf.pruning.outputs import Scaling, plain_gradients

__all__ = ["IGNORED_LABEL", "BatchLoss", "LossFunction", "check_counts", "is_unlabelled", "model_loss", "to_device"]

logger = logging.getLogger(__name__)

LossFunction = Callable[[nn.Module, Any], Tensor]

# The label of what does not count, in PyTorch's cross entropy and so in transformers.
IGNORED_LABEL = -100


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that the model itself computes for a batch, found as Trainer finds it.

    That is the entry ``"loss"`` of a dictionary or ``ModelOutput``, or the first entry of a tuple.

    Raises:
        ValueError: the batch is no dictionary, or the model returns no loss; the message says what it returned.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch is a {type(batch).__name__}, and the model takes the entries of a dictionary as arguments: let "
            "the collate function return one, or compute the loss by loss_fn(model, batch)"
        )
    outputs = model(**batch)
    if isinstance(outputs, Mapping):
        loss, returned = outputs.get("loss"), f"a dictionary of {sorted(outputs)}"
    elif isinstance(outputs, tuple | list):
        loss, returned = (outputs[0] if outputs else None), f"a {type(outputs).__name__} of {len(outputs)}"
    else:
        loss, returned = getattr(outputs, "loss", None), f"a {type(outputs).__name__}"
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f", with a tensor of shape {tuple(loss.shape)} in its place" if isinstance(loss, Tensor) else ""
        raise ValueError(
            f"{type(model).__name__} returned no loss for a batch of {sorted(batch)}, but {returned}{shape}: labels "
            "are missing, or the loss is to be computed by loss_fn(model, batch)"
        )
    return loss


class BatchLoss:
    """The loss of one batch and its gradients; a loss of NaN has to come from labels that are all ignored.

    The mean over no label is 0 / 0, and its gradient zero. Any other loss that is not finite comes from a model or
    data that cannot be used.

    Attributes:
        missing: whether the loss was NaN.
        norms: of the gradients by the outputs, (count,), once :meth:`gradients` has scaled by them; ones without.

    Args:
        loss_fn: ``loss_fn(model, batch)``.
        model: the model.
        batch: the batch, on its device.
        count: examples in the batch.
        parameters: the weights whose gradients are wanted, by name.
        scaling: how gradients are scaled; None for those of the loss as it is.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        model: nn.Module,
        batch: Any,
        count: int,
        parameters: Mapping[str, nn.Parameter],
        scaling: Scaling | None = None,
    ) -> None:
        self._arguments = loss_fn, model, batch
        self._count, self._parameters, self._scaling = count, parameters, scaling
        self.missing = False
        self.norms = torch.ones(count)
        self._value: Tensor | None = None
        self._outputs: list[Tensor] = []

    def __call__(self) -> Tensor:
        """Compute the loss.

        Raises:
            ValueError: it is no single number, infinite, or without a gradient; or gradients are scaled by outputs
                that the model does not return.
        """
        loss_fn, model, batch = self._arguments
        if self._scaling is None:
            value = loss_fn(model, batch)
        else:
            with self._scaling.watched(model, self._count) as self._outputs:
                value = loss_fn(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"the loss of a batch is {found}; expected a tensor of one number, the mean over examples"
            )
        if not value.requires_grad:
            raise ValueError("the loss of a batch has no gradient: it was detached, or depends on no weight")
        self._value = value.detach()
        self.missing = bool(value.isnan())
        if value.isinf():
            self._refuse()
        return value

    def gradients(self, value: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the gradients of the loss that was computed last, as the Fisher wants them; None for zeros.

        Args:
            value: the loss.
            inputs: tensors to differentiate by: the parameters, or outputs of layers.

        Raises:
            ValueError: gradients are scaled by outputs, and the loss does not depend on them alone.
        """
        if self._scaling is None:
            return plain_gradients(value, inputs)
        found, self.norms = self._scaling.gradients(value, self._outputs, inputs, self._parameters)
        return found

    def by_parameter(self) -> list[Tensor]:
        """Compute the loss and its gradient by each parameter, flat and in float32; zeros where it depends on none."""
        parameters = self._parameters
        gradients = self.gradients(self(), list(parameters.values()))
        return [
            self.checked(
                name, torch.zeros(p.numel(), device=p.device) if gradient is None else gradient.flatten().float()
            )
            for (name, p), gradient in zip(parameters.items(), gradients, strict=True)
        ]

    def checked(self, name: str, rows: Tensor) -> Tensor:
        """Return gradients of this loss.

        Raises:
            ValueError: they are not finite, or the loss is NaN and they are not zero.
        """
        if self.missing and bool(rows.any()):  # true for NaN
            self._refuse()
        if not torch.isfinite(rows.sum()):
            raise ValueError(f"a gradient of {name} is not finite, although the loss is; check the model's weights")
        return rows

    def _refuse(self) -> None:
        raise ValueError(
            f"the loss of a batch is {self._value}; expected one finite number. A model whose loss is not finite "
            "cannot be pruned by its gradients: check its weights and the data"
        )


def check_counts(examples: int, unlabelled: int, steep: int) -> None:
    """Refuse gradients that are all zero.

    Args:
        examples: examples that gave gradients.
        unlabelled: those of them without a label.
        steep: those whose loss changes with the outputs.

    Raises:
        ValueError: no example has a label, or none a gradient.
    """
    if unlabelled == examples:
        raise ValueError(
            f"the loss of each of {examples} examples is nan, and has no gradient: their labels are missing or "
            "all ignored (-100); check the labels and what the collate function makes of them"
        )
    if not steep:
        raise ValueError(
            f"the gradient of the loss by the model's outputs is zero for each of {examples} examples, so that "
            "there is nothing to prune by: the model may fit them to the last digit; check loss and labels, or "
            "take other examples"
        )
    if unlabelled:
        logger.info("%d of %d examples have no label that counts; their gradient is zero", unlabelled, examples)


def is_unlabelled(batch: Any) -> bool:
    """Return whether a batch has labels, and all of them are ignored."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and bool((labels == IGNORED_LABEL).all())


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch on a device, with the tensors inside mappings, lists and tuples."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [to_device(value, device) for value in batch]
    return batch
