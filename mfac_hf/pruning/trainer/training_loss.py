"""The loss that a Trainer minimises, for the gradients of the pruner."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from mfac_hf.pruning.gradient_source import GradientSource
from mfac_hf.pruning.gradients import DataLoaderGradients
from mfac_hf.pruning.losses import LossFunction
from mfac_hf.pruning.passes import PassQueue, joined, kind_of
from mfac_hf.pruning.undisturbed import undisturbed

__all__ = ["calling_trainer", "check_is_mean", "training_loss"]

# Relative difference of gradients that rounding explains, also in half precision.
_SAME = 2e-2


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """Return the Trainer that is calling one of its callbacks, which hands them everything but itself.

    It is the one further up the stack; None where something else calls.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and any(each is callback for each in caller.callback_handler.callbacks):
            return caller
        frame = frame.f_back
    return None


def training_loss(trainer: Trainer | None, args: TrainingArguments) -> LossFunction | None:
    """Return the loss that training minimises as ``loss_fn(model, batch)``; None where it is the model's own.

    Another one comes from a subclass's ``compute_loss``, from ``compute_loss_func`` or from label smoothing.

    Raises:
        ValueError: there is no Trainer to ask, and labels are smoothed.
    """
    if trainer is None:
        if args.label_smoothing_factor:
            raise ValueError(
                f"training minimises a loss with label_smoothing_factor {args.label_smoothing_factor:g}, which only "
                "Trainer computes: add the callback by MFACPruningCallback(...).attach(trainer), or give its loss_fn"
            )
        return None
    own = getattr(trainer.compute_loss, "__func__", None) is Trainer.compute_loss
    if own and trainer.compute_loss_func is None and trainer.label_smoother is None:
        return None

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value: Any = trainer.compute_loss(model, dict(batch))  # a copy, as Trainer takes the labels out
        return value

    return loss


def check_is_mean(source: GradientSource | None, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse a loss of batches that is not the mean of the losses that their examples have by themselves.

    Weights of classes, for example, cancel in a batch of one, and gradients of single examples know nothing of them.
    Gradients of batches do, and those of the optimizer. In scaled gradients such weights cancel everywhere, as every
    example counts alike.

    Raises:
        ValueError: the difference, and the ways out.
    """
    if not isinstance(source, DataLoaderGradients) or source.batch_size > 1:
        return
    error, count = _mean_error(source, model, parameters)
    if error > _SAME:
        raise ValueError(
            f"the gradient of Trainer's loss over {count} examples is not the mean of their gradients one by one "
            f"(relative difference {error:.1g}): weights of classes, for example, cancel in batches of one. Pruning "
            "takes gradients of single examples, which are not those of training then. Ways out: grad_batch_size "
            "above 1; or loss_fn(model, batch) that is the mean of a loss for each example, such as (weight[labels] * "
            "cross_entropy(logits, labels, reduction='none')).mean()"
        )


def _mean_error(
    source: DataLoaderGradients, model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> tuple[float, int]:
    """Compare the gradient of some examples' loss in one batch with the mean of their own gradients.

    They have equally many labels, and tensors of the same shapes, so that neither the mean over tokens nor padding
    makes a difference.

    Returns:
        The norm of the difference, relative to the mean norm of their own gradients; and their number.
    """
    kinds: dict[str, list[Any]] = {}
    some = torch.randperm(len(source.pool), generator=torch.Generator().manual_seed(0)).tolist()
    queue = PassQueue([source.pool[i] for i in some[: source.at_once(model, parameters)]], 1)
    with undisturbed(model, parameters, seed=0):
        for batch in source.batches(model, queue):
            kinds.setdefault(kind_of(batch), []).append(batch)
        alike = max(kinds.values(), key=len)
        rest = torch.cat(source.loss_of(model, joined(alike), parameters, len(alike)).by_parameter())
        norms = 0.0
        for batch in alike:
            own = torch.cat(source.loss_of(model, batch, parameters, 1).by_parameter())
            rest -= own / len(alike)
            norms += float(own.norm()) / len(alike)
    return float(rest.norm()) / norms if norms else 0.0, len(alike)
