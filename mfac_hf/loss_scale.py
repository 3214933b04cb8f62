"""Whether the gradient of a Trainer is that of a mean: over the batches that it accumulates, and over the ranks.

Trainer hands ``num_items_in_batch`` to each model whose ``forward`` takes ``**kwargs``, expects the loss to be divided
by it, and leaves out its own division by accumulation steps (and, for the mean over ranks, multiplies by them). Models
that ignore the number, BERT's classifiers among them, get gradients that are as many times too large. The damping, the
learning rate and the clipping of M-FAC are in units of the gradient.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import Trainer

from mfac_hf.optim.mfac import MFAC
from mfac_hf.optim.unwrap import unwrap_optimizer

__all__ = ["correct_loss_scale", "loss_ignores_num_items", "warn_of_loss_scale"]


def correct_loss_scale(trainer: Trainer) -> None:
    """Let a Trainer divide the loss itself, where the model does not: before ``trainer.train()``."""
    if _factor(trainer) > 1 and loss_ignores_num_items(trainer):
        trainer.model_accepts_loss_kwargs = False
    _trust(trainer)


def warn_of_loss_scale(trainer: Trainer) -> None:
    """Warn if the gradient of a Trainer is too large, and say how large and what to set."""
    factor = _factor(trainer)
    try:
        ignores = factor > 1 and loss_ignores_num_items(trainer)
    except Exception as error:  # a batch or a model that this cannot run is no reason to stop a training
        warnings.warn(
            f"could not find out whether the loss is divided by num_items_in_batch ({type(error).__name__}: {error}). "
            f"If it is not, gradient accumulation and ranks make gradients {factor} times too large",
            stacklevel=2,
        )
        return
    _trust(trainer)
    if ignores:
        remedy = (
            "divide the loss of compute_loss_func by it"
            if trainer.compute_loss_func is not None
            else "set trainer.model_accepts_loss_kwargs = False"
        )
        warnings.warn(
            f"the loss of {type(trainer.model).__name__} ignores num_items_in_batch, and Trainer relies on it: with "
            f"gradient accumulation over {trainer.args.gradient_accumulation_steps} batches and "
            f"{trainer.args.world_size} ranks, gradients are {factor} times as large as those of one batch. "
            f"Before trainer.train(), {remedy}",
            stacklevel=2,
        )


def loss_ignores_num_items(trainer: Trainer) -> bool:
    """Whether Trainer relies on a division by ``num_items_in_batch`` that its loss leaves out.

    The loss of one batch is computed for two numbers, in evaluation mode; the state of torch's generator stays.
    """
    if not trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None:
        return False  # Trainer divides
    model: Any = trainer.model
    training = model.training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        batch = _first_batch(trainer)
        if "labels" not in batch:
            return False  # Trainer counts labels: without them it divides
        model.eval()
        try:
            one, two = (_loss(trainer, model, batch, number) for number in (1, 2))
        finally:
            model.train(training)
    return one == two != 0.0


def _factor(trainer: Trainer) -> int:
    """How many times as large gradients are where the loss ignores the number of items."""
    args = trainer.args
    ranks = args.world_size * max(1, args.n_gpu) if args.average_tokens_across_devices else 1
    return int(args.gradient_accumulation_steps) * int(ranks)


def _loss(trainer: Trainer, model: Any, batch: dict[str, Any], number: int) -> float:
    items: Any = torch.tensor(number, device=trainer.args.device)
    loss: Any = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    return float(loss.mean())


def _first_batch(trainer: Trainer) -> Any:
    loader: Any = trainer.get_train_dataloader()
    try:
        return trainer._prepare_inputs(next(iter(loader)))
    finally:
        if hasattr(loader, "end"):  # accelerate believes to be inside a loader until it is exhausted
            loader.end()


def _trust(trainer: Trainer) -> None:
    optimizer = unwrap_optimizer(trainer.optimizer)
    if isinstance(optimizer, MFAC):
        optimizer.trust_loss_scale()
