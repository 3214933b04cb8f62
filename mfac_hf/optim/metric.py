r"""The metric in which the window measures gradients: the identity (the paper's), or Adam's.

In Adam's metric :math:`D = \mathrm{diag}(\sqrt{\hat v} + \epsilon)` the window holds :math:`\tilde g = D^{-1/2} g`,
scaled with D as it is when g arrives, and a direction is :math:`D^{-1/2} \tilde G^\top c` with D as it is now. A
metric stands between the window and its stores: it writes a gradient and hands back its dot products, and it turns
weights into a direction.

:math:`\hat v` is Adam's bias-corrected second moment, kept for the columns of each store. Rows of a table that a
gradient does not touch only decay, and do so when they are looked at: :math:`\hat v_t = \hat v_s\, \beta_2^{t-s}
(1 - \beta_2^s) / (1 - \beta_2^t)` for a row last touched at step s, which is what the dense update comes to.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mfac_hf.fisher.columns import ColumnStore, DenseColumns, RowSparseColumns, SparseRows
from mfac_hf.ops.metric import metric_combine, metric_move, metric_push
from mfac_hf.optim.placement import Placement

__all__ = [
    "AdamMetric",
    "IdentityMetric",
    "Member",
    "Metric",
    "Move",
    "SavedMoment",
    "Scaling",
    "as_of_now",
    "next_scalings",
    "saved_moments",
]


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


def next_scalings(
    groups: Sequence[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]], parameters: Iterable[Tensor]
) -> dict[Tensor, Scaling]:
    """What each parameter with a gradient needs at its next step; empty in the identity metric."""
    stepped = set(parameters)
    scalings = {}
    for group in groups:
        if "betas" not in group:
            continue
        for p in group["params"]:
            if p in stepped:
                step = states[p].get("moment_step", 0) + 1
                scalings[p] = Scaling(group["betas"][1], group["eps"], step)
    return scalings


def saved_moments(
    groups: Sequence[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]]
) -> dict[Tensor, SavedMoment]:
    """What the states hold of Adam's metric."""
    moments = {}
    for group in groups:
        for p in group["params"]:
            if p in states and "second_moment" in states[p]:
                state = states[p]
                scaling = Scaling(group["betas"][1], group["eps"], state["moment_step"])
                moments[p] = SavedMoment(state["second_moment"], state.get("moment_steps"), scaling)
    return moments


class Metric(Protocol):
    """Stands between the window and its stores."""

    def push(
        self, columns: ColumnStore, row: int, count: int, parts: Sequence[Any], members: Sequence[Member]
    ) -> Tensor:
        """Store a gradient as row ``row`` and return its products with the first ``count`` rows, (count,), float64.

        ``parts`` and ``members`` are of the parameters of the store, in the order of its columns.
        """

    def combine(self, columns: ColumnStore, weights_M: Tensor, *, dtype: torch.dtype | None) -> Any:
        """The direction for these weights, as a part of the store; in float64 where ``dtype`` says so."""

    def move(
        self, columns: ColumnStore, weights_M: Tensor, moves: Sequence[Move | None], *, dtype: torch.dtype | None
    ) -> bool:
        """Move the parameters of the store along their directions, in the pass that combines.

        Args:
            columns: the store.
            weights_M: as for `combine`.
            moves: of its parameters, in the order of its columns; None for one that has no gradient.
            dtype: as for `combine`.

        Returns:
            Whether it was done: this metric has such a pass.
        """

    def admit(self, columns: ColumnStore, moments: Sequence[SavedMoment | None], sizes: Sequence[int]) -> None:
        """Begin with a new store.

        Args:
            columns: the store.
            moments: what an earlier run left of each parameter, in the order of its columns.
            sizes: columns of each parameter.
        """

    def replace(self, old: ColumnStore, new: DenseColumns, positions: Tensor | None) -> None:
        """Go on with a store that has the columns of another one, or those at ``positions`` alone."""

    def keep_only(self, stores: Sequence[ColumnStore]) -> None:
        """Forget all other stores."""

    def state(self, placement: Placement) -> dict[str, Tensor]:
        """What the optimizer's state holds of a parameter's metric: views, no copies."""


class IdentityMetric:
    """The paper's metric: gradients are stored as they come."""

    def push(
        self, columns: ColumnStore, row: int, count: int, parts: Sequence[Any], members: Sequence[Member]
    ) -> Tensor:
        """Store a gradient and return its dot products."""
        columns.write(row, columns.join(parts))
        return columns.dots(row, count)

    def combine(self, columns: ColumnStore, weights_M: Tensor, *, dtype: torch.dtype | None) -> Any:
        """The combination of the stored parts."""
        return columns.combine_part(weights_M, dtype=dtype)

    def move(
        self, columns: ColumnStore, weights_M: Tensor, moves: Sequence[Move | None], *, dtype: torch.dtype | None
    ) -> bool:
        """Not done."""
        return False

    def admit(self, columns: ColumnStore, moments: Sequence[SavedMoment | None], sizes: Sequence[int]) -> None:
        """Nothing to begin."""

    def replace(self, old: ColumnStore, new: DenseColumns, positions: Tensor | None) -> None:
        """Nothing to take over."""

    def keep_only(self, stores: Sequence[ColumnStore]) -> None:
        """Nothing to forget."""

    def state(self, placement: Placement) -> dict[str, Tensor]:
        """Nothing to save."""
        return {}


class AdamMetric:
    """Adam's metric: see the module."""

    def __init__(self) -> None:
        self._stores: dict[ColumnStore, _DenseMoment | _TableMoment] = {}

    def push(
        self, columns: ColumnStore, row: int, count: int, parts: Sequence[Any], members: Sequence[Member]
    ) -> Tensor:
        """Take a gradient into the second moment, store it scaled, and return its dot products."""
        return self._stores[columns].push(row, count, parts, members)

    def combine(self, columns: ColumnStore, weights_M: Tensor, *, dtype: torch.dtype | None) -> Any:
        """The combination of the stored parts, scaled back."""
        return self._stores[columns].combine(weights_M, dtype)

    def move(
        self, columns: ColumnStore, weights_M: Tensor, moves: Sequence[Move | None], *, dtype: torch.dtype | None
    ) -> bool:
        """Done for dense stores."""
        return self._stores[columns].move(weights_M, moves, dtype)

    def admit(self, columns: ColumnStore, moments: Sequence[SavedMoment | None], sizes: Sequence[int]) -> None:
        """Begin with second moments of zero, or go on with those of an earlier run."""
        moment: Any = _TableMoment(columns) if isinstance(columns, RowSparseColumns) else _DenseMoment(columns)
        moment.take(moments, sizes)
        self._stores[columns] = moment

    def replace(self, old: ColumnStore, new: DenseColumns, positions: Tensor | None) -> None:
        """Take the second moments of some or all columns over to another store."""
        before = self._stores.pop(old).dense().to(new.device)
        self._stores[new] = _DenseMoment(new, before if positions is None else before[positions.to(new.device)])

    def keep_only(self, stores: Sequence[ColumnStore]) -> None:
        """Forget all other stores; one that is new here has no parameters."""
        self._stores = {columns: self._stores.get(columns) or _DenseMoment(columns) for columns in stores}

    def state(self, placement: Placement) -> dict[str, Tensor]:
        """Second moment of a parameter's columns; of a table as its rows were when last touched, with their steps."""
        return self._stores[placement.columns].state(placement)


class _DenseMoment:
    """Second moment of the columns of a dense store, (d,)."""

    def __init__(self, columns: Any, moment_D: Tensor | None = None) -> None:
        self.columns = columns
        if moment_D is None:
            moment_D = torch.zeros(columns.dim, dtype=columns.result_dtype, device=columns.device)
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
        moment = self.moment_D[placement.start : placement.start + placement.size]
        return {"second_moment": moment.view(placement.shape) if placement.keep is None else moment}

    def push(self, row: int, count: int, parts: Sequence[Tensor], members: Sequence[Member]) -> Tensor:
        buffer_MD = self.columns.buffer_MD
        dots_M = torch.zeros(count, dtype=torch.float64, device=buffer_MD.device)
        self._segments = []
        for segment in _segments(members):
            if segment.scaling is None:  # it stays as it is, and its columns get zeros
                buffer_MD[row, segment.columns].zero_()
                continue
            moment_D = self.moment_D[segment.columns]
            grads = [part.to(moment_D) for part in parts[segment.members]]
            rate, eps = segment.scaling.rate, segment.scaling.eps
            dots_M += metric_push(buffer_MD[:, segment.columns], grads, moment_D, row, count, rate, eps)
            self._segments.append(segment)
        return dots_M

    def combine(self, weights_M: Tensor, dtype: torch.dtype | None) -> Tensor:
        buffer_MD, wide = self.columns.buffer_MD[: len(weights_M)], dtype == torch.float64
        weights_M = weights_M.to(buffer_MD.device)
        direction_D = torch.zeros_like(self.moment_D)
        for columns, _, scaling in self._segments:  # parameters without a gradient stay where they are
            step_D = metric_combine(buffer_MD[:, columns], weights_M, self.moment_D[columns], scaling.eps, wide)
            if len(step_D) == len(direction_D):
                return step_D
            direction_D[columns] = step_D
        return direction_D

    def move(self, weights_M: Tensor, moves: Sequence[Move | None], dtype: torch.dtype | None) -> bool:
        buffer_MD, wide = self.columns.buffer_MD[: len(weights_M)], dtype == torch.float64
        weights_M = weights_M.to(buffer_MD.device)
        for columns, members, scaling in self._segments:
            targets, factors, rates = zip(*moves[members], strict=True)
            moment_D = self.moment_D[columns]
            metric_move(buffer_MD[:, columns], weights_M, moment_D, scaling.eps, wide, targets, factors, rates)
        return True


class _TableMoment:
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
        return {"second_moment": self.moment_VH, "moment_steps": self.steps_V}

    def _decayed(self, rows: Tensor) -> Tensor:
        return as_of_now(self.moment_VH[rows], self.steps_V[rows], self._now)

    def push(self, row: int, count: int, parts: Sequence[SparseRows], members: Sequence[Member]) -> Tensor:
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
        rows, values = self.columns.combine_part(weights_M, dtype=dtype)
        scale = self._decayed(rows).sqrt().add_(self._now.eps).sqrt_()
        return SparseRows(rows, values.to(scale.dtype).div_(scale))

    def move(self, weights_M: Tensor, moves: Sequence[Move | None], dtype: torch.dtype | None) -> bool:
        return False


def as_of_now(moment_NH: Tensor, steps_N: Tensor, now: Scaling) -> Tensor:
    """Rows of a table's second moment at the present step, had no gradient touched them since theirs."""
    since_N = steps_N.double()
    factor_N = now.beta2 ** (now.step - since_N) * (1 - now.beta2**since_N) / (1 - now.beta2**now.step)
    return moment_NH * factor_N.unsqueeze(1).to(moment_NH)


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
