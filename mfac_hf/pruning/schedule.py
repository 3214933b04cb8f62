r"""Schedules: when to prune, and to which sparsity.

A schedule is a list of points (position, sparsity). Positions count steps or epochs; at the beginning of that step or
epoch the model is pruned to that sparsity. With :math:`\tau` running from 0 at ``start`` to 1 at ``end``, the curves
are

.. math:: s_{linear} = s_1 + (s_0 - s_1)(1 - \tau), \qquad s_{cubic} = s_1 + (s_0 - s_1)(1 - \tau)^3, \qquad
          1 - s_{geometric} = (1 - s_0)^{1 - \tau} (1 - s_1)^\tau
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

__all__ = ["SparsitySchedule"]

Unit = Literal["step", "epoch"]


@dataclass(frozen=True)
class SparsitySchedule:
    """Points at which to prune; build one with :meth:`from_list`, :meth:`linear`, :meth:`cubic` or :meth:`geometric`.

    Attributes:
        points: ((position, sparsity), ...) with rising whole positions >= 0 and rising sparsities in (0, 1). A point
            that does not raise the sparsity asks for nothing and is left out.
        unit: ``"step"`` (optimizer steps) or ``"epoch"``.

    Raises:
        ValueError: a sparsity outside [0, 1) or below its predecessor, positions that do not rise, an unknown unit, or
            nothing to prune at all.
    """

    points: tuple[tuple[int, float], ...]
    unit: Unit = "step"

    def __post_init__(self) -> None:
        if self.unit not in ("step", "epoch"):
            raise ValueError(f"unit is {self.unit!r}; expected 'step' or 'epoch'")
        last_position, last_sparsity = -1, 0.0
        kept = []
        for position, sparsity in self.points:
            _check_whole("a position", position, 0)
            if not 0.0 <= sparsity < 1.0:  # false for NaN
                raise ValueError(f"sparsity {sparsity!r} at {self.unit} {position}; expected a number in [0, 1)")
            if position <= last_position:
                raise ValueError(
                    f"{self.unit} {position} comes after {self.unit} {last_position}; positions must rise"
                )
            if sparsity < last_sparsity:
                raise ValueError(
                    f"the schedule falls from {last_sparsity} to {sparsity} at {self.unit} {position}; pruned "
                    "weights do not come back: put the sparsities in rising order"
                )
            if sparsity > last_sparsity:
                kept.append((int(position), float(sparsity)))
            last_position, last_sparsity = position, sparsity
        if not kept:
            raise ValueError(f"the schedule {list(self.points)} prunes nothing; name a sparsity above 0")
        object.__setattr__(self, "points", tuple(kept))

    @classmethod
    def from_list(
        cls, sparsities: Sequence[float], *, every: int = 1, start: int = 0, unit: Unit = "epoch"
    ) -> SparsitySchedule:
        """Take the given sparsities one after another, the first at ``start``, ``every`` steps or epochs apart.

        >>> SparsitySchedule.from_list([0.5, 0.75, 0.875], every=2).points
        ((0, 0.5), (2, 0.75), (4, 0.875))

        Raises:
            ValueError: as for the class, and ``every`` < 1.
        """
        _check_whole("every", every, 1)
        _check_whole("start", start, 0)
        return cls(tuple((start + i * every, sparsity) for i, sparsity in enumerate(sparsities)), unit)

    @classmethod
    def linear(
        cls, *, initial: float = 0.0, final: float, start: int = 0, end: int, every: int = 1, unit: Unit = "step"
    ) -> SparsitySchedule:
        """Rise from ``initial`` at ``start`` to ``final`` at ``end``, by the same amount each time.

        >>> SparsitySchedule.linear(final=0.5, end=4, every=2).points
        ((2, 0.25), (4, 0.5))

        Args:
            initial: sparsity at ``start``; 0 prunes nothing there.
            final: sparsity at ``end``, where the model is pruned even if ``every`` does not divide the way.
            start: first position.
            end: last position, above ``start``.
            every: positions from one pruning to the next.
            unit: what positions count.

        Raises:
            ValueError: as for the class, and ``every`` < 1 or ``start`` >= ``end``.
        """
        return cls._curve(lambda rest: final + (initial - final) * rest, initial, final, start, end, every, unit)

    @classmethod
    def cubic(
        cls, *, initial: float = 0.0, final: float, start: int = 0, end: int, every: int = 1, unit: Unit = "step"
    ) -> SparsitySchedule:
        """Rise fast at first and slowly near ``final`` (Zhu and Gupta, 2017); arguments as in :meth:`linear`.

        >>> SparsitySchedule.cubic(final=0.5, end=4, every=2).points
        ((2, 0.4375), (4, 0.5))
        """
        return cls._curve(lambda rest: final + (initial - final) * rest**3, initial, final, start, end, every, unit)

    @classmethod
    def geometric(
        cls, *, initial: float = 0.0, final: float, start: int = 0, end: int, every: int = 1, unit: Unit = "step"
    ) -> SparsitySchedule:
        """Remove the same share of the weights that are left each time; arguments as in :meth:`linear`.

        >>> SparsitySchedule.geometric(final=0.75, end=4, every=2).points
        ((2, 0.5), (4, 0.75))
        """

        def sparsity(rest: float) -> float:
            return 1 - (1 - initial) ** rest * (1 - final) ** (1 - rest)

        return cls._curve(sparsity, initial, final, start, end, every, unit)

    @classmethod
    def _curve(
        cls,
        sparsity: Callable[[float], float],
        initial: float,
        final: float,
        start: int,
        end: int,
        every: int,
        unit: Unit,
    ) -> SparsitySchedule:
        """Put points on a curve; ``sparsity`` takes 1 - tau."""
        _check_whole("every", every, 1)
        _check_whole("start", start, 0)
        _check_whole("end", end, 0)
        if start >= end:
            raise ValueError(f"the schedule starts at {unit} {start} and ends at {unit} {end}; expected start < end")
        cls(((start, initial), (end, final)), unit)  # refuses ends that are out of range or fall
        positions = [*range(start, end, every), end]
        values = [sparsity((end - position) / (end - start)) for position in positions]
        # Rounding must move neither end, and make no value fall.
        values = [initial, *(min(max(value, initial), final) for value in values[1:-1]), final]
        return cls(tuple(zip(positions, accumulate(values, max), strict=True)), unit)

    @property
    def final(self) -> float:
        """The last and highest sparsity."""
        return self.points[-1][1]

    def sparsity_at(self, position: float) -> float:
        """Return the sparsity that is due at the beginning of a step or epoch: that of the last point so far, or 0."""
        reached = bisect_right(self.points, (math.floor(position), 1.0))
        return self.points[reached - 1][1] if reached else 0.0

    def in_steps(self, steps_per_epoch: int) -> SparsitySchedule:
        """Return the schedule by steps; ``steps_per_epoch`` plays no part where it is one already."""
        points = tuple((position * steps_per_epoch, sparsity) for position, sparsity in self.points)
        return self if self.unit == "step" else SparsitySchedule(points, "step")


def _check_whole(name: str, value: float, least: int) -> None:
    if isinstance(value, bool) or not math.isfinite(value) or value != int(value) or value < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}")
