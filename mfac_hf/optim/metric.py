r"""The metric in which the window measures gradients: the identity (the paper's), or Adam's.

In Adam's metric :math:`D = \mathrm{diag}(\sqrt{\hat v} + \epsilon)` the window holds :math:`\tilde g = D^{-1/2} g`,
scaled with D as it is when g arrives, and a direction is :math:`D^{-1/2} \tilde G^\top c` with D as it is now. A
metric stands between the window and its stores: it writes a gradient and hands back its dot products, and it turns
weights into a direction. `mfac_hf.optim.second_moment`
keeps :math:`\hat v`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mfac_hf.fisher.columns import ColumnStore, DenseColumns, RowSparseColumns
from mfac_hf.optim.placement import Placement
from mfac_hf.optim.second_moment import DenseMoment, Member, Move, SavedMoment, Scaling, TableMoment

__all__ = ["AdamMetric", "IdentityMetric", "Metric", "next_scalings", "saved_moments"]


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
        self._stores: dict[ColumnStore, DenseMoment | TableMoment] = {}

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
        moment: Any = TableMoment(columns) if isinstance(columns, RowSparseColumns) else DenseMoment(columns)
        moment.take(moments, sizes)
        self._stores[columns] = moment

    def replace(self, old: ColumnStore, new: DenseColumns, positions: Tensor | None) -> None:
        """Take the second moments of some or all columns over to another store."""
        before = self._stores.pop(old).dense().to(new.compute_device)
        self._stores[new] = DenseMoment(new, before if positions is None else before[positions.to(before.device)])

    def keep_only(self, stores: Sequence[ColumnStore]) -> None:
        """Forget all other stores; one that is new here has no parameters."""
        self._stores = {columns: self._stores.get(columns) or DenseMoment(columns) for columns in stores}

    def state(self, placement: Placement) -> dict[str, Tensor]:
        """Second moment of a parameter's columns; of a table as its rows were when last touched, with their steps."""
        return self._stores[placement.columns].state(placement)
