"""The loss curve of a training run, the time that its steps took, and when it reached a loss.

Losses of batches are noisy, so curves are compared by their running mean over a tenth of the run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["Curve", "LossCurve", "LossCurveCallback", "final_loss", "first_reach", "running_mean"]

MEAN_SHARE = 0.1  # of the run


class Curve(TypedDict):
    """Four lists of the same length, with an entry for each log.

    ``loss`` is the mean over the steps since the log before, ``seconds`` and ``cpu_seconds`` count from the start.
    """

    step: list[int]
    loss: list[float]
    seconds: list[float]
    cpu_seconds: list[float]


class LossCurve:
    """Record losses, and the time between `begin_step` and `end_step`.

    CPU seconds are those of the process and its threads, in user and system mode, which other programs on the same
    core do not add to. What happens between steps, such as evaluation, does not count.
    """

    def __init__(self) -> None:
        self.curve = Curve(step=[], loss=[], seconds=[], cpu_seconds=[])
        self._spent = self._begun = (0.0, 0.0)
        self._step, self._losses = 0, list[float]()

    def begin_step(self) -> None:
        """Start the clocks."""
        self._begun = _clocks()

    def end_step(self, device: torch.device) -> None:
        """Stop the clocks when the device has done its work."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now, begun, spent = _clocks(), self._begun, self._spent
        self._spent = (spent[0] + now[0] - begun[0], spent[1] + now[1] - begun[1])

    def add_step(self, loss: float, every: int = 1) -> None:
        """Add the loss of a step, for an entry after each ``every`` steps: for a loop that keeps no log itself."""
        self._step += 1
        self._losses.append(loss)
        if self._step % every == 0:
            self.add(self._step, statistics.mean(self._losses))
            self._losses.clear()

    def add(self, step: int, loss: float) -> None:
        """Add the mean loss of the steps since the last call."""
        entry = {"step": step, "loss": loss, "seconds": self._spent[0], "cpu_seconds": self._spent[1]}
        for name, value in entry.items():
            self.curve[name].append(value)  # type: ignore[literal-required]


class LossCurveCallback(TrainerCallback):
    """Record the curve of a Trainer: at each of its logs, the steps alone.

    A step is forward, backward and optimizer; loading, logging, evaluation and saving are left out. A run that resumes
    from a checkpoint has the curve of its own steps.
    """

    def __init__(self) -> None:
        self.recorder = LossCurve()

    @classmethod
    def attach(cls, trainer: Trainer) -> LossCurveCallback:
        """Make a callback and put it in front of the others, whose work between steps does not count then."""
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clocks."""
        self.recorder.begin_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clocks."""
        self.recorder.end_step(args.device)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record a training loss; other logs have none."""
        if logs is not None and "loss" in logs:
            self.recorder.add(state.global_step, logs["loss"])


def running_mean(curve: Mapping[str, Any]) -> list[float | None]:
    """At each log the mean loss of the last tenth of the run's length; None before so many steps were taken.

    >>> running_mean({"step": [*range(1, 21)], "loss": [1.0] * 18 + [0.5, 0.25]})[-2:]
    [0.75, 0.375]
    """
    steps, width = curve["step"], MEAN_SHARE * curve["step"][-1]
    means: list[float | None] = []
    for step in steps:
        near = [loss for other, loss in zip(steps, curve["loss"], strict=True) if step - width < other <= step]
        means.append(statistics.mean(near) if step >= width else None)
    return means


def final_loss(curve: Mapping[str, Any]) -> float:
    """The last running mean: the mean loss of the last tenth of the run."""
    last = running_mean(curve)[-1]
    assert last is not None
    return last


def first_reach(curve: Mapping[str, Any], loss: float) -> int | None:
    """Index of the first log whose running mean is not above this loss; None if there is none.

    The running mean of a noisy curve is below a loss before the mean of many such curves is. So a run is compared with
    the first time that the other one reached its own last running mean, not with the other's length.

    >>> first_reach({"step": [*range(1, 41)], "loss": [1 - step / 100 for step in range(40)]}, 0.8)
    22
    """
    return next((i for i, mean in enumerate(running_mean(curve)) if mean is not None and mean <= loss), None)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
