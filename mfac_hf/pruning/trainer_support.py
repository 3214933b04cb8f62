"""Which ways of Trainer the pruning callback supports, and the model as the pruner has to see it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import TrainerState, TrainingArguments

__all__ = ["refuse_unsupported", "without_fp16"]


def refuse_unsupported(args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
    """Raise ValueError where pruning would silently do something else."""
    marks = ("ds_id", "device_mesh", "_is_flat_param")
    if any(getattr(p, mark, False) is not False for p in model.parameters() for mark in marks):
        raise ValueError(
            "DeepSpeed ZeRO and FSDP shard the weights, which this callback does not support; prune under "
            "DistributedDataParallel or in one process"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process for {args.n_gpu} GPUs (nn.DataParallel) is not supported; start one for each with torchrun, "
            "or show it one with CUDA_VISIBLE_DEVICES"
        )
    if state.is_hyper_param_search and args.save_strategy != "no":
        raise ValueError(
            "hyper-parameter search saves each trial where callbacks do not see it; set save_strategy='no' to search"
        )


@contextlib.contextmanager
def without_fp16(model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """The model as it was before accelerate made it compute in float16, in which gradients underflow unscaled."""
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
