r"""Adam's second moment of the parameters in a store of the window, and what a step does with it.

:math:`\hat v` is Adam's bias-corrected second moment, kept for the columns of each store. Rows of a table that a
gradient does not touch only decay, and do so when they are looked at: :math:`\hat v_t = \hat v_s\, \beta_2^{t-s}
(1 - \beta_2^s) / (1 - \beta_2^t)` for a row last touched at step s, which is what the dense update comes to.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfac_hf.fisher.columns import RowSparseColumns, SparseRows
from mfac_hf.ops.metric import metric_combine, metric_move, metric_push

__all__ = ["DenseMoment", "Member", "Move", "SavedMoment", "Scaling", "TableMoment", "as_of_now"]


class Scaling(NamedTuple):
    r"""What Adam's second moment of a parameter needs at a step.

    Attributes:
        beta2: :math:`\beta_2`, its decay.
        eps: :math:`\epsilon`, added to its root.
        step: t, from 1.
    """

    beta2: float
    eps: float
    step: int

    @property
    def rate(self) -> float:
        r""":math:`r_t = (1 - \beta_2) / (1 - \beta_2^t)`."""
        return (1 - self.beta2) / (1 - self.beta2**self.step)


class Member(NamedTuple):
    """A parameter among those that share a store.

    Attributes:
        size: its columns.
        scaling: None in a step that brings it no gradient.
    """

    size: int
    scaling: Scaling | None


class Move(NamedTuple):
    r"""How a parameter moves along its direction u: :math:`\theta \leftarrow f \theta - \eta u`.

    Attributes:
        target: :math:`\theta`, contiguous, in the type of directions; it changes.
        factor: f, which decoupled weight decay makes smaller than 1.
        rate: :math:`\eta`.
    """

    target: Tensor
    factor: float
    rate: float


class SavedMoment(NamedTuple):
    """What the state of a parameter holds of Adam's metric.

    Attributes:
        moment: the second moment: of the parameter's shape, or flat where a mask leaves columns out.
        steps: of a table, the step at which each row was last touched; None where all of them are up to date.
        scaling: of the last step.
    """

    moment: Tensor
    steps: Tensor | None
    scaling: Scaling


class DenseMoment:
    """Second moment of the columns of a dense store, (d,)."""

    def __init__(self, columns: Any, moment_D: Tensor | None = None) -> None:
        self.columns = columns
        if moment_D is None:
            moment_D = torch.zeros(columns.dim, dtype=columns.result_dtype, device=columns.compute_device)
        self.moment_D = moment_D
        self._segments: list[_Segment] = []  # of the last push, those with a gradient

    def take(self, moments: Sequence[SavedMoment | None], sizes: Sequence[int]) -> None:
        """Copy what an earlier run left of each parameter."""
        for place, saved in zip(self.moment_D.split(list(sizes)), moments, strict=True):
            if saved is None:
                continue
            moment, steps, scaling = saved
            place.copy_((moment if steps is None else as_of_now(moment, steps, scaling)).flatten())

    def dense(self) -> Tensor:
        """As it is now, (d,)."""
        return self.moment_D

    def state(self, placement: Any) -> dict[str, Tensor]:
        """Of one parameter: a view."""
        moment = self.moment_D[placement.start : placement.start + placement.size]
        return {"second_moment": moment.view(placement.shape) if placement.keep is None else moment}

    def push(self, row: int, count: int, parts: Sequence[Tensor], members: Sequence[Member]) -> Tensor:
        """As `mfac_hf.optim.metric.Metric.push`."""
        dots_M = torch.zeros(count, dtype=torch.float64, device=self.moment_D.device)
        self._segments = []
        for segment in _segments(members):
            if segment.scaling is None:  # it stays as it is, and its columns get zeros
                self.columns.buffer_MD[row, segment.columns].zero_()
                continue
            grads = [part.to(self.moment_D) for part in parts[segment.members]]
            rate, eps, first = segment.scaling.rate, segment.scaling.eps, segment.columns.start

            def run(
                window_MC: Tensor,
                place: slice,
                grads: list[Tensor] = grads,
                rate: float = rate,
                eps: float = eps,
                first: int = first,
            ) -> None:
                pieces = _cut(grads, place.start - first, place.stop - first)
                dots_M.add_(metric_push(window_MC, pieces, self.moment_D[place], row, count, rate, eps))

            self.columns.sweep(segment.columns, count, run, writes=row)
            self._segments.append(segment)
        return dots_M

    def combine(self, weights_M: Tensor, dtype: torch.dtype | None) -> Tensor:
        """As `mfac_hf.optim.metric.Metric.combine`."""
        weights_M, wide = weights_M.to(self.moment_D.device), dtype == torch.float64
        direction_D = None
        for columns, _, scaling in self._segments:
            steps: list[Tensor] = []

            def run(window_MC: Tensor, place: slice, steps: list[Tensor] = steps, eps: float = scaling.eps) -> None:
                steps.append(metric_combine(window_MC, weights_M, self.moment_D[place], eps, wide))

            self.columns.sweep(columns, len(weights_M), run)
            if len(steps) == 1 and len(steps[0]) == len(self.moment_D):
                return steps[0]
            if direction_D is None:  # parameters without a gradient stay where they are
                direction_D = torch.zeros_like(self.moment_D)
            direction_D[columns] = torch.cat(steps) if steps else 0.0
        return torch.zeros_like(self.moment_D) if direction_D is None else direction_D

    def move(self, weights_M: Tensor, moves: Sequence[Move | None], dtype: torch.dtype | None) -> bool:
        """As `mfac_hf.optim.metric.Metric.move`."""
        weights_M, wide = weights_M.to(self.moment_D.device), dtype == torch.float64
        for columns, members, scaling in self._segments:
            targets, factors, rates = zip(*moves[members], strict=True)

            def run(
                window_MC: Tensor,
                place: slice,
                targets: Sequence[Tensor] = targets,
                by_target: Sequence[tuple[float, float]] = tuple(zip(factors, rates, strict=True)),
                first: int = columns.start,
                eps: float = scaling.eps,
            ) -> None:
                cut = _cut_each(targets, place.start - first, place.stop - first)
                moved = [(piece, *by_target[number]) for number, piece in cut]
                metric_move(window_MC, weights_M, self.moment_D[place], eps, wide, *zip(*moved, strict=True))

            self.columns.sweep(columns, len(weights_M), run)
        return True


class TableMoment:
    """Second moment of a table, (v, h), each row as it was when a gradient last touched it."""

    def __init__(self, columns: RowSparseColumns) -> None:
        self.columns = columns
        self.moment_VH = torch.zeros(columns.shape, dtype=columns.result_dtype, device=columns.device)
        self.steps_V = torch.zeros(columns.shape[0], dtype=torch.int64, device=columns.device)  # 0: never touched
        self._now = Scaling(0.0, 1.0, 0)

    def take(self, moments: Sequence[SavedMoment | None], sizes: Sequence[int]) -> None:
        """Copy what an earlier run left."""
        (saved,) = moments
        if saved is None:
            return
        moment, steps, self._now = saved
        self.moment_VH.copy_(moment.view(self.columns.shape))
        if steps is None:
            self.steps_V.fill_(self._now.step)
        else:
            self.steps_V.copy_(steps)

    def dense(self) -> Tensor:
        """As it is now, (v * h,)."""
        return as_of_now(self.moment_VH, self.steps_V, self._now).flatten()

    def state(self, placement: Any) -> dict[str, Tensor]:
        """The table as it is kept, and the step of each row."""
        return {"second_moment": self.moment_VH, "moment_steps": self.steps_V}

    def _decayed(self, rows: Tensor) -> Tensor:
        return as_of_now(self.moment_VH[rows], self.steps_V[rows], self._now)

    def push(self, row: int, count: int, parts: Sequence[SparseRows], members: Sequence[Member]) -> Tensor:
        """As `mfac_hf.optim.metric.Metric.push`."""
        ((_, scaling),), (part,) = members, parts
        if scaling is None:
            self.columns.write(row, part)  # of no row
            return self.columns.dots(row, count)
        self._now = scaling
        rows, grads = part.rows.to(self.columns.device), part.values.to(self.moment_VH)
        moment = self._decayed(rows) + scaling.rate * grads.square()
        self.moment_VH[rows], self.steps_V[rows] = moment, scaling.step
        self.columns.write(row, SparseRows(rows, grads / moment.sqrt().add_(scaling.eps).sqrt_()))
        return self.columns.dots(row, count)

    def combine(self, weights_M: Tensor, dtype: torch.dtype | None) -> SparseRows:
        """As `mfac_hf.optim.metric.Metric.combine`."""
        rows, values = self.columns.combine_part(weights_M, dtype=dtype)
        scale = self._decayed(rows).sqrt().add_(self._now.eps).sqrt_()
        return SparseRows(rows, values.to(scale.dtype).div_(scale))

    def move(self, weights_M: Tensor, moves: Sequence[Move | None], dtype: torch.dtype | None) -> bool:
        """Not done."""
        return False


def as_of_now(moment_NH: Tensor, steps_N: Tensor, now: Scaling) -> Tensor:
    """Rows of a table's second moment at the present step, had no gradient touched them since theirs."""
    since_N = steps_N.double()
    factor_N = now.beta2 ** (now.step - since_N) * (1 - now.beta2**since_N) / (1 - now.beta2**now.step)
    return moment_NH * factor_N.unsqueeze(1).to(moment_NH)


def _cut(pieces: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """The numbers from ``start`` to ``stop`` of tensors that lie side by side, as views."""
    return [piece for _, piece in _cut_each(pieces, start, stop)]


def _cut_each(pieces: Sequence[Tensor], start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """The same with the place of the tensor that each is of."""
    first = 0
    for number, piece in enumerate(pieces):
        size = piece.numel()
        low, high = max(start - first, 0), min(stop - first, size)
        if low < high or (size == 0 and start <= first <= stop):
            yield number, piece if high - low == size else piece.view(-1)[low:high]
        first += size


class _Segment(NamedTuple):
    """Neighbours that are scaled alike.

    Attributes:
        columns: of the store.
        members: places among the parameters of the store.
        scaling: None without gradients.
    """

    columns: slice
    members: slice
    scaling: Any


def _segments(members: Sequence[Member]) -> Iterator[_Segment]:
    """The segments of a store."""
    start = stop = first = 0
    for number, (size, scaling) in enumerate(members, start=1):
        stop += size
        if number == len(members) or members[number].scaling != scaling:
            yield _Segment(slice(start, stop), slice(first, number), scaling)
            start, first = stop, number
