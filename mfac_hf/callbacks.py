"""Callback that adds the state of M-FAC's gradient window to Trainer's logs."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mfac_hf.hub.trainer_card import attach_card
from mfac_hf.optim.mfac import MFAC
from mfac_hf.optim.unwrap import unwrap_optimizer

__all__ = ["MFACLoggingCallback"]


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
