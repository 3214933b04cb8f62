"""Cycles of the learning rate that start anew with each pruning, on top of any scheduler."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

__all__ = ["LearningRateCycle"]


class LearningRateCycle:
    r"""A factor for the learning rates that falls linearly from one pruning to the next.

    With prunings at steps :math:`t_1 < t_2 < \dots` and the end of training as the last :math:`t`, the factor of step
    :math:`t` in :math:`[t_i, t_{i+1})` is :math:`1 - (1 - c)(t - t_i)/(t_{i+1} - t_i)`; before :math:`t_1` it is 1.

    The optimizer's groups have scaled rates only while it steps. Schedulers, some of which compute the next rate from
    the present one, never see them.

    Args:
        lowest: c in (0, 1), at which each cycle ends.

    Raises:
        ValueError: c is out of range.
    """

    def __init__(self, lowest: float) -> None:
        if not 0.0 < lowest < 1.0:
            raise ValueError(f"lr_cycle is {lowest!r}; expected a number between 0 and 1, or None")
        self.lowest = lowest
        self._marks: list[int] = []
        self._scheduled: list[Any] = []

    def begin(self, prunings: Sequence[int], max_steps: int) -> None:
        """Set the steps at which there will be a pruning, and the number of steps of the training."""
        self._marks = [step for step in prunings if step < max_steps] + [max_steps]
        self._scheduled = []

    def factor(self, step: int) -> float:
        """Return the factor of a step."""
        passed = bisect_right(self._marks, step)
        if not 0 < passed < len(self._marks):
            return 1.0
        begin, end = self._marks[passed - 1 : passed + 1]
        return 1 - (1 - self.lowest) * (step - begin) / (end - begin)

    def scale(self, optimizer: Any, step: int) -> None:
        """Multiply the learning rates of the optimizer's groups by the factor of a step."""
        self._scheduled = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor(step)

    def restore(self, optimizer: Any) -> None:
        """Give the groups the learning rates that they had before :meth:`scale`."""
        for group, learning_rate in zip(optimizer.param_groups, self._scheduled, strict=True):
            group["lr"] = learning_rate
