"""What the pruning callback asks of a Trainer: checks, schedule in steps, gradients, and the model without float16."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from mfac_hf.pruning.gradient_source import GradientSource
from mfac_hf.pruning.gradients import DataLoaderGradients
from mfac_hf.pruning.groups import plan_groups
from mfac_hf.pruning.options import PruningKeywords, PruningOptions
from mfac_hf.pruning.outputs import OutputsFunction
from mfac_hf.pruning.schedule import SparsitySchedule
from mfac_hf.pruning.window_gradients import WindowGradients

__all__ = [
    "all_ranks",
    "check_source",
    "gradient_source",
    "pruning_options",
    "refuse_unsupported",
    "schedule_in_steps",
    "warn_of_end",
    "without_fp16",
]

logger = logging.getLogger(__name__)


def all_ranks(args: TrainingArguments) -> dist.ProcessGroup | None:
    """Return the processes of a distributed training; None for a single process."""
    return dist.group.WORLD if args.world_size > 1 else None


def pruning_options(gradients: str, keywords: PruningKeywords) -> PruningOptions:
    """Make the options of prunings with gradients of the data, or of the optimizer's window.

    Those of the window are means over examples, which nothing scales any more: their Fisher is the empirical one.

    Raises:
        TypeError: an option that does not exist.
        ValueError: an option out of range, or a scaled Fisher that is asked for with gradients of the window.
    """
    if gradients not in ("data", "optimizer"):
        raise ValueError(f"gradients is {gradients!r}; expected 'data' or 'optimizer'")
    if gradients == "optimizer":
        if keywords.get("fisher") == "scaled":
            raise ValueError(
                "gradients='optimizer' takes gradients of training, which are means over examples, and "
                "fisher='scaled' divides each example's by a number of its own: leave fisher out (it is the empirical "
                "one then), or take gradients='data'"
            )
        if keywords.get("first_order") or keywords.get("batch_norm_samples"):
            raise ValueError(
                "first_order and batch_norm_samples need examples at the pruned weights, and gradients='optimizer' "
                "has none: leave them out, or take gradients='data'"
            )
        keywords = {"fisher": "empirical", **keywords}
    return PruningOptions(**keywords)


def refuse_unsupported(
    args: TrainingArguments, state: TrainerState, model: nn.Module, *, lacks_evaluation: bool = False
) -> None:
    """Raise ValueError where pruning would silently do something else.

    Args:
        args: arguments of the training.
        state: its state.
        model: the model.
        lacks_evaluation: whether losses over Trainer's evaluation data are asked for, and it has not handed any over.
    """
    marks = ("ds_id", "device_mesh", "_is_flat_param")
    if any(getattr(p, mark, False) is not False for p in model.parameters() for mark in marks):
        raise ValueError(
            "DeepSpeed ZeRO and FSDP shard the weights, which this callback does not support; prune under "
            "DistributedDataParallel or in one process"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process for {args.n_gpu} GPUs (nn.DataParallel) is not supported; start a process for each with "
            "torchrun, or show this one a single GPU with CUDA_VISIBLE_DEVICES"
        )
    if getattr(model, "peft_config", None) and args.save_strategy != "no":
        raise ValueError(
            "Trainer saves the adapters of a PEFT model alone, and the pruned weights below them would be lost: merge "
            "them first, model = model.merge_and_unload(), or set save_strategy='no' and save the model yourself"
        )
    if lacks_evaluation and not args.eval_on_start:
        raise ValueError(
            "evaluate=True needs Trainer's evaluation data, which it hands over when it evaluates for the first "
            "time: set TrainingArguments(eval_on_start=True), or call trainer.evaluate() before trainer.train()"
        )
    if state.is_hyper_param_search and args.save_strategy != "no":
        raise ValueError(
            "hyper-parameter search saves each trial where callbacks do not see it; set save_strategy='no' to search"
        )


def schedule_in_steps(
    schedule: SparsitySchedule, args: TrainingArguments, state: TrainerState, dataloader: DataLoader[Any]
) -> SparsitySchedule:
    """Return the schedule by steps; warn where the training ends before it.

    Raises:
        ValueError: the schedule counts epochs, and the data have no length.
    """
    steps = schedule
    if schedule.unit == "epoch":
        if not has_length(dataloader):
            raise ValueError("the training data have no length to count epochs by; use a schedule of unit='step'")
        steps = schedule.in_steps(math.ceil(len(dataloader) / args.gradient_accumulation_steps))
    if (last := steps.points[-1][0]) >= state.max_steps:
        logger.warning(
            "the schedule ends at step %d, but training at step %d, with a sparsity of %g instead of %g",
            last, state.max_steps, steps.sparsity_at(state.max_steps - 1), schedule.final,
        )  # fmt: skip
    return steps


def warn_of_end(steps: SparsitySchedule, state: TrainerState, sparsity: float) -> None:
    """Warn that the training has ended before the last sparsity of its schedule (by steps) was reached."""
    if state.is_world_process_zero:
        logger.warning(
            "training ended at step %d with a sparsity of %.4g; the schedule asks for %g, from step %d on: train on, "
            "or prune the rest with prune_one_shot",
            state.global_step, sparsity, steps.final, steps.points[-1][0],
        )  # fmt: skip


def gradient_source(
    options: PruningOptions,
    gradients: str,
    optimizer: Any,
    dataloader: DataLoader[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    process_group: dist.ProcessGroup | None,
    outputs_fn: OutputsFunction | None = None,
) -> GradientSource | None:
    """Make the source of gradients and held-out losses that the options ask for; None where they need neither."""
    data = None
    if (gradients == "data" and options.method == "mfac") or options.loss_samples:
        data = DataLoaderGradients.of_options(dataloader, options, loss_fn, process_group, outputs_fn)
    return WindowGradients(optimizer, data) if gradients == "optimizer" else data


def check_source(
    source: GradientSource | None,
    options: PruningOptions,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    first_step: int,
) -> None:
    """Refuse a source that will have too few gradients, too little memory for their Fisher, or no loss for a batch.

    Args:
        source: source of the gradients; None where none are needed.
        options: options of the prunings.
        model: the model.
        parameters: its targets, by name.
        first_step: the step of training at which the first pruning will be.

    Raises:
        ValueError: too few gradients, or the loss of a batch cannot be used.
        MemoryError: the Fisher of a single target does not fit.
    """
    if source is None:
        return
    losses = source.losses if isinstance(source, WindowGradients) else source
    if isinstance(losses, DataLoaderGradients):
        losses.try_batch(model, parameters)
    if options.method == "magnitude":
        return
    if isinstance(source, WindowGradients):
        source.check_at_step(options.num_grads, first_step)
    else:
        source.check(options.num_grads)
    plan_groups(parameters, options, source)


@contextlib.contextmanager
def without_fp16(model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Let the model compute as before accelerate made it use float16, in which unscaled gradients underflow."""
    wrapped = vars(model).get("forward")
    if not args.fp16 or wrapped is None:
        yield
        return
    original: Any = model._original_forward
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped
