"""The gradient window of an optimizer's parameters: from gradients by parameter to directions by parameter.

A `GramMatrix` knows the algebra, column stores hold the numbers, and a `Placement` says which columns are a
parameter's. This joins them, lets parameters in when their first gradients come, and takes masked coordinates out.
"""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.fisher.columns import ColumnStore, DenseColumns, Part
from mfac_hf.fisher.gram import GramMatrix, algebra_device
from mfac_hf.memory import gram_matrix_bytes
from mfac_hf.optim.borrowed import own_buffers
from mfac_hf.optim.masks import shrink_stores
from mfac_hf.optim.metric import AdamMetric, IdentityMetric, Metric
from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.placement import (
    DensePlacement,
    Placement,
    TablePlacement,
    distinct_columns,
    first_bytes,
    kept_positions,
    to_dense,
)
from mfac_hf.optim.second_moment import Member, Move, SavedMoment, Scaling
from mfac_hf.optim.sharded import Layout
from mfac_hf.optim.sharing import Owner, assign_owners, broadcast_directions, cut_moments, place_own
from mfac_hf.optim.update import order_moves

__all__ = ["ParameterWindow"]


class ParameterWindow:
    """A sliding window of gradients whose columns belong to parameters.

    Args:
        placements: columns of the parameters that are in the window from the start; at least one, or ranks that share.
        options: of the window.
        moments: second moments of parameters, where an earlier run left them; in Adam's metric.
        sharing: ranks with the same gradients that share the window; each keeps the columns of some parameters.
        layout: how parameters lie on ranks, where they are placed on a mesh; each keeps the columns of what it has.

    Attributes:
        columns: the stores, each once.
        metric: in which the gradients are stored.
        gram: the Gram matrix of the stored gradients, over all stores and ranks.
        placements: of the parameters whose columns this rank keeps, in the order of the columns.
        owners: of every parameter with columns, on whichever rank.
        borrows: whether the stores are those of a loaded state, which others may hold too.
        rearranged: whether columns have come, gone or moved since the window was put into the optimizer's state.
    """

    def __init__(
        self,
        placements: dict[Tensor, Placement],
        options: ParameterWindowOptions,
        *,
        moments: Mapping[Tensor, SavedMoment] | None = None,
        sharing: dist.ProcessGroup | None = None,
        layout: Layout | None = None,
    ) -> None:
        # A rank without a parameter of its own still takes part in the sums.
        idle: ColumnStore = DenseColumns(options.num_grads, 0, dtype=options.window_dtype)
        self.options = options
        self.sharing, self.layout = sharing, layout
        self.placements = placements
        self.owners = {p: Owner.whole(p.shape) for p in placements}
        self._rank = 0 if sharing is None else dist.get_rank(sharing)
        self.columns = distinct_columns(placements.values()) or [idle]
        self.metric: Metric = AdamMetric() if options.metric == "adam" else IdentityMetric()
        group = sharing if layout is None else layout.group
        relative = options.metric == "adam"
        device = algebra_device(options.num_grads, self.columns[0].compute_device)
        self.gram = GramMatrix(options, relative=relative, device=device, process_group=group)
        for store in self.columns:
            self._admit(store, moments or {})
        self.borrows = False
        self.rearranged = True

    @classmethod
    def from_gradients(
        cls,
        gradients: dict[Tensor, Tensor],
        masks: dict[Tensor, Tensor],
        options: ParameterWindowOptions,
        *,
        moments: Mapping[Tensor, SavedMoment] | None = None,
        sharing: dist.ProcessGroup | None = None,
        layout: Layout | None = None,
    ) -> "ParameterWindow":
        """A window for the parameters that have these first gradients.

        Raises:
            MemoryError: if it does not fit, with the numbers; nothing is allocated then.
        """
        owners = assign_owners(
            {p: first_bytes(grad, masks.get(p), options) for p, grad in gradients.items()}, {}, masks, sharing
        )
        gram_bytes = gram_matrix_bytes(options.num_grads)
        own = place_own(gradients, owners, masks, options, sharing, layout, gram_bytes=gram_bytes)
        if sharing is not None:
            moments = cut_moments(moments or {}, owners, dist.get_rank(sharing))
        window = cls(own, options, moments=moments, sharing=sharing, layout=layout)
        window.owners = owners
        return window

    @property
    def copies(self) -> Set[Tensor]:
        """Parameters of which this rank has a copy that does not count."""
        return frozenset() if self.layout is None else self.layout.copies

    @property
    def count(self) -> int:
        """Gradients held, at most ``num_grads``."""
        return self.gram.count

    @property
    def nbytes(self) -> int:
        """Bytes that the stored gradients take here."""
        return sum(columns.nbytes for columns in self.columns)

    @property
    def tables(self) -> dict[Tensor, Placement]:
        """The parameters with row-sparse columns."""
        return {p: placement for p, placement in self.placements.items() if isinstance(placement, TablePlacement)}

    def _members(self, columns: ColumnStore) -> dict[Tensor, Placement]:
        """The parameters whose columns a store holds, in order."""
        return {p: placement for p, placement in self.placements.items() if placement.columns is columns}

    def _admit(self, columns: ColumnStore, moments: Mapping[Tensor, SavedMoment]) -> None:
        members = self._members(columns)
        self.metric.admit(columns, [moments.get(p) for p in members], [m.size for m in members.values()])

    def add(
        self,
        new: dict[Tensor, Tensor],
        masks: dict[Tensor, Tensor],
        moments: Mapping[Tensor, SavedMoment] | None = None,
    ) -> None:
        """Let in parameters that have no columns yet, with zeros in the rows already stored.

        Raises:
            MemoryError: if they do not fit, with the numbers; nothing changes then.
        """
        self.rearranged = True
        sizes = {p: first_bytes(grad, masks.get(p), self.options) for p, grad in new.items()}
        owners = assign_owners(sizes, self.owners, masks, self.sharing)
        if self.sharing is not None:
            moments = cut_moments(moments or {}, owners, self._rank)
        placements = place_own(new, owners, masks, self.options, self.sharing, self.layout)
        self.owners.update(owners)
        self.placements.update(placements)
        for columns in distinct_columns(placements.values()):
            columns.clear(slice(self.count))
            self.columns.append(columns)
            self._admit(columns, moments or {})

    def push(
        self,
        gradients: dict[Tensor, Tensor],
        masks: dict[Tensor, Tensor],
        scalings: Mapping[Tensor, Scaling] | None = None,
    ) -> None:
        """Store one gradient for each parameter in place of the oldest; zeros for those that have none now.

        Args:
            gradients: by parameter.
            masks: by parameter, of those that have one.
            scalings: of the parameters with a gradient, in Adam's metric.

        Raises:
            MemoryError: if a table that was row-sparse no longer is and does not fit; nothing is stored then.
        """
        self._own_stores()
        gradients, masks = self._own(gradients), self._own(masks)
        parts: dict[ColumnStore, list[Part]] = {columns: [] for columns in self.columns}
        for p, placement in list(self.placements.items()):
            part: Any = placement.part(gradients.get(p), p.device, masks.get(p))
            if isinstance(placement, TablePlacement) and placement.outgrown_by(part):
                placement = self._densify(p, placement, masks.get(p))
                parts[placement.columns] = []
                part = placement.part(gradients[p], p.device, masks.get(p))
            parts[placement.columns].append(part)
        members: dict[ColumnStore, list[Member]] = {columns: [] for columns in self.columns}
        for p, placement in self.placements.items():
            scaling = scalings.get(p) if scalings and p in gradients else None
            members[placement.columns].append(Member(placement.size, scaling))
        row, count = self.gram.next_row, self.gram.next_count
        dots = [self.metric.push(columns, row, count, parts[columns], members[columns]) for columns in self.columns]
        self.gram.push(self._counted(dots))

    def _own(self, tensors: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """What belongs to this rank's columns of tensors that have the shapes of whole parameters."""
        if self.sharing is None:
            return tensors
        return {p: self.owners[p].cut(x, self._rank) for p, x in tensors.items() if p in self.placements}

    def _counted(self, products: list[Tensor]) -> list[Tensor]:
        """Dot products of each store, zero for those that count on another rank."""
        if not self.copies:
            return products
        copied = {self.placements[p].columns for p in self.copies & self.placements.keys()}
        return [torch.zeros_like(x) if c in copied else x for c, x in zip(self.columns, products, strict=True)]

    def _densify(self, p: Tensor, table: TablePlacement, mask: Tensor | None) -> DensePlacement:
        """Move a parameter's columns from a table into a dense store."""
        dense = to_dense(table, self.count, self.options, kept_positions(mask), p.device)
        self.metric.replace(table.columns, dense.columns, dense.keep)
        self.columns[self.columns.index(table.columns)] = dense.columns
        self.placements[p] = dense
        self.rearranged = True
        return dense

    def directions(self, gradients: dict[Tensor, Tensor], moves: Mapping[Tensor, Move]) -> dict[Tensor, Part]:
        """The direction of each parameter with a gradient: a tensor of its shape, or the rows of a table.

        Args:
            gradients: by parameter.
            moves: of parameters that may be moved at once, which saves their directions a way through memory. Those
                that were moved have no direction in the result.
        """
        weights_M = self.gram.direction_weights(self.options.grad_decay, nesterov=self.options.nesterov)
        dtype = self.gram.combine_dtype(weights_M)
        combined, allowed = {}, {} if self.sharing else moves
        for columns in self.columns:
            mine = order_moves(self._members(columns), gradients, allowed, columns.compute_device)
            if mine is None or not self.metric.move(columns, weights_M, mine, dtype=dtype):
                combined[columns] = self.metric.combine(columns, weights_M, dtype=dtype)
        directions: dict[Tensor, Part] = {
            p: placement.direction(combined[placement.columns], p.device)
            for p, placement in self.placements.items()
            if p in gradients and placement.columns in combined
        }
        if self.sharing is None:
            return directions
        return broadcast_directions(directions, list(gradients), self.owners, self.options.result_dtype, self.sharing)

    def shrink(self, masks: dict[Tensor, Tensor]) -> None:
        """Forget what these masks no longer keep; the rest is the window of the kept coordinates.

        Raises:
            MemoryError: if a smaller buffer does not fit beside the one that it replaces; nothing changes then.
        """
        self._keep_columns(self._own(masks))
        for p in masks.keys() & self.owners.keys():
            owner = self.owners[p]
            self.owners[p] = owner._replace(size=min(owner.size, int(masks[p].sum()) * self.options.column_bytes))
        self._count_anew()

    def _count_anew(self) -> None:
        """Compute the Gram matrix from the stored gradients."""
        self.gram.set(self.gram.add_up(self._counted([columns.gram(self.count) for columns in self.columns])))

    def _keep_columns(self, masks: dict[Tensor, Tensor]) -> None:
        """Drop the columns that these masks no longer keep; the Gram matrix stays as it is."""
        if self.borrows:
            for p in masks:
                if isinstance(placement := self.placements.get(p), TablePlacement):
                    own_buffers(placement.columns, 1)
        members = {columns: self._members(columns) for columns in self.columns}
        placements, replaced = shrink_stores(members, masks, self.count, self.options)
        # Last, because nothing fails from here on. Tables stay and lose numbers in place.
        self.rearranged = True
        for columns, smaller, positions in replaced:
            self.metric.replace(columns, smaller, positions)
        for p, placement in placements.items():
            if isinstance(placement, TablePlacement) and p in masks:
                placement.columns.keep_only(masks[p])
        self.placements = placements
        self.columns = distinct_columns(placements.values()) or self.columns

    def forget(self, parameters: Iterable[Tensor]) -> None:
        """Take out parameters, as if the window had never held them.

        Raises:
            MemoryError: as `shrink`; nothing changes then.
        """
        gone = set(parameters)
        before = self.placements
        dense = {
            p: placement for p, placement in before.items() if p in gone and isinstance(placement, DensePlacement)
        }
        self.placements = {p: placement for p, placement in before.items() if p in dense or p not in gone}
        try:
            self._keep_columns({p: torch.zeros(part.shape, dtype=torch.bool) for p, part in dense.items()})
        except MemoryError:
            self.placements = before
            raise
        for p in gone:
            self.placements.pop(p, None)
            self.owners.pop(p)
        idle: ColumnStore = DenseColumns(self.options.num_grads, 0, dtype=self.options.window_dtype)
        self.columns = distinct_columns(self.placements.values()) or [idle]
        self.metric.keep_only(self.columns)
        self._count_anew()

    def set_options(self, options: ParameterWindowOptions) -> None:
        """Go on with another damping or grad_decay."""
        self.options = self.gram.options = options

    def _own_stores(self) -> None:
        """Copy what others hold too, before it is written: the stores of a loaded state.

        Raises:
            MemoryError: if the copy does not fit; nothing changes then.
        """
        if self.borrows:
            for columns in self.columns:
                own_buffers(columns, sum(placement.columns is columns for placement in self.placements.values()))
            self.borrows, self.rearranged = False, True

    def stored_gradients(self, p: Tensor) -> Tensor:
        """The gradients held of one parameter, oldest first, shape (count, p.numel()); zero where they are masked.

        Raises:
            KeyError: if the window has no columns of this parameter here.
        """
        return self.placements[p].stored((self.gram.newest + 1 + torch.arange(self.count)) % self.count)

    def clear_unwritten(self) -> None:
        """Zero the rows that hold no gradient yet: before they are saved or copied, not before they are used."""
        if not self.borrows:  # else somebody has done so
            for columns in self.columns:
                columns.clear(slice(self.count, None))
