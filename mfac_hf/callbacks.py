"""Callbacks for Trainer: M-FAC's gradient window in its logs, and in its checkpoints where ranks share it."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mfac_hf.hub.trainer_card import attach_card
from mfac_hf.optim.mfac import MFAC
from mfac_hf.optim.unwrap import unwrap_optimizer
from mfac_hf.storage import sync_directory

__all__ = ["MFACLoggingCallback", "MFACWindowCallback"]


class MFACLoggingCallback(TrainerCallback):
    """Add ``mfac/<name>`` to each training log for every entry of ``MFAC.window_stats()``.

    The entries are the fill of the window (0 to 1), an estimate of the condition number of its damped Gram matrix, the
    number of steps skipped for gradients that were not finite, how often jitter had to grow, and the size of the
    window in GiB. Training logs are those with a ``loss``. Evaluation logs stay as they are: Trainer returns the same
    dictionary as the metrics. With another optimizer the callback does nothing.

    Trainer stores a log in ``state.log_history`` and then calls the callbacks in order, its reporters (TensorBoard and
    others) before those of ``Trainer(callbacks=[...])``. A callback given that way adds the values to the history and
    the printed logs; :meth:`attach` puts it in front, so that reporters see them too.
    """

    @classmethod
    def attach(cls, trainer: Trainer) -> MFACLoggingCallback:
        """Make a callback, put it in front of the reporters of ``trainer``, and attach our card to ``trainer``.

        The card names the optimizer that ran; Trainer's own names that of TrainingArguments (`mfac_hf.attach_card`).
        """
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        attach_card(trainer)
        return callback

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the window's statistics to ``logs`` and to the entry that Trainer has just stored."""
        optimizer = unwrap_optimizer(optimizer)
        if logs is None or "loss" not in logs or not isinstance(optimizer, MFAC):
            return
        stats = {f"mfac/{name}": value for name, value in optimizer.window_stats().items()}
        logs.update(stats)
        state.log_history[-1].update(stats)


class MFACWindowCallback(TrainerCallback):
    """Keep the window that ranks share in Trainer's checkpoints, and go on with it when Trainer resumes.

    Trainer asks one rank for the optimizer's state, and that rank has a part of the window only. This callback lets
    each rank write its part into the folder ``mfac_window`` of each checkpoint (`MFAC.write_window`), under
    DistributedDataParallel and FSDP2. A run that is resumed, on any number of ranks, reads it from there: from the
    directory in ``TrainingArguments.resume_from_checkpoint``, or from ``checkpoint-<step>`` in the output directory.
    Where the window is not shared, or ``save_window=False``, the callback does nothing.

    A window is written into ``_mfac_window`` in the output directory before Trainer writes the rest, and moves into
    the checkpoint when that is complete: a checkpoint is never without it, also if Trainer deletes the older one.

    Args:
        resume_from: the checkpoint to resume from, if it lies elsewhere.
    """

    def __init__(self, resume_from: str | os.PathLike[str] | None = None) -> None:
        self.resume_from = resume_from
        self._written = -1  # the step of the window beside the checkpoints

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Read the window of the checkpoint that Trainer has loaded.

        Raises:
            ValueError: the window is another run's, or damaged.
        """
        mfac = _saving_mfac(args, state, optimizer)
        if mfac is None or state.global_step == 0 or mfac.window_stats()["window_fill"] > 0:
            return
        found = [self._find(args, state)]
        if args.world_size > 1:
            dist.broadcast_object_list(found, src=0)
        if found[0] is not None:
            mfac.read_window(found[0])
        elif args.world_size > 1:
            warnings.warn(
                f"the checkpoint of step {state.global_step} has no window of MFAC: it refills. If it lies outside of "
                "the output directory, pass MFACWindowCallback(resume_from=DIRECTORY)",
                stacklevel=2,
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the window beside the checkpoints, if Trainer is about to save."""
        mfac = _saving_mfac(args, state, optimizer)
        if control.should_save and mfac is not None and mfac.shares_window:
            mfac.write_window(_beside(args, state))
            self._written = state.global_step

    on_epoch_end = on_step_end

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Move the window into the checkpoint."""
        mfac = _saving_mfac(args, state, optimizer)
        if mfac is None or not mfac.shares_window:
            return
        target = _checkpoint(args, state) / _WINDOW
        if self._written != state.global_step:  # saved for another reason than a step
            mfac.write_window(target)
        elif args.should_save:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(_beside(args, state), target)
            sync_directory(target.parent)
            shutil.rmtree(_beside(args, state).parent, ignore_errors=True)

    def _find(self, args: TrainingArguments, state: TrainerState) -> str | None:
        """The window of the checkpoint that Trainer has loaded."""
        given = [self.resume_from] if self.resume_from is not None else [args.resume_from_checkpoint]
        places = [Path(str(place)) / _WINDOW for place in given if isinstance(place, (str, os.PathLike))]
        places += [_checkpoint(args, state) / _WINDOW, _beside(args, state)]
        return next((str(place) for place in places if (place / ".metadata").is_file()), None)


_WINDOW = "mfac_window"


def _saving_mfac(args: TrainingArguments, state: TrainerState, optimizer: Any) -> MFAC | None:
    """The optimizer, if it is an `MFAC` whose window belongs into Trainer's checkpoints."""
    optimizer = unwrap_optimizer(optimizer)
    if not isinstance(optimizer, MFAC) or not optimizer.defaults["save_window"]:
        return None
    return None if args.save_only_model or state.is_hyper_param_search else optimizer


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder that Trainer saves in at this step."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _beside(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the window of this step waits. Trainer leaves folders that begin with an underscore out when it pushes."""
    return Path(str(args.output_dir)) / f"_{_WINDOW}" / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
