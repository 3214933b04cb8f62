"""The gradient window of an optimizer's parameters: from gradients by parameter to directions by parameter.

`GradientWindow` knows columns, `Placement` knows which columns are a parameter's. This joins the two, lets parameters
in when their first gradients come, and deals parameters out to ranks that share one window.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.fisher.columns import DenseColumns, RowSparseColumns
from mfac_hf.fisher.window import GradientWindow
from mfac_hf.memory import require_memory
from mfac_hf.optim.placement import (
    ROW_SPARSE_DENSIFY,
    Placement,
    distinct_columns,
    kept_positions,
    place,
    stored_numbers,
    to_dense,
)

__all__ = ["ParameterWindow"]


class ParameterWindow(GradientWindow):
    """A gradient window whose columns belong to parameters.

    Args:
        placements: columns of the parameters that are in the window from the start; at least one, or ranks that share.
        options: num_grads, damping, normalize, window_dtype, window_device and row_sparse of `MFAC`.
        sharing: ranks with the same gradients that share the window; each keeps the columns of some parameters.
        shards: ranks that each hold a shard of every parameter (FSDP2); each keeps the columns of its shards.
    """

    def __init__(
        self,
        placements: dict[Tensor, Placement],
        options: dict[str, Any],
        *,
        sharing: dist.ProcessGroup | None = None,
        shards: dist.ProcessGroup | None = None,
    ) -> None:
        # A rank without a parameter of its own still takes part in the sums.
        idle = DenseColumns(options["num_grads"], 0, dtype=options["window_dtype"])
        super().__init__(
            options["num_grads"],
            distinct_columns(placements.values()) or [idle],
            damping=options["damping"],
            normalize=options["normalize"],
            dtype=options["window_dtype"],
            process_group=sharing if shards is None else shards,
        )
        self.options = options
        self.sharing = sharing
        self.placements = placements  # of the parameters whose columns this rank keeps, in the order of the columns
        # Of every parameter with columns: the rank that keeps them, and the numbers of a gradient there.
        self.owners: dict[Tensor, tuple[int, int]] = dict.fromkeys(placements, (0, 0))

    @classmethod
    def from_gradients(
        cls,
        gradients: dict[Tensor, Tensor],
        masks: dict[Tensor, Tensor],
        options: dict[str, Any],
        *,
        sharing: dist.ProcessGroup | None = None,
        shards: dist.ProcessGroup | None = None,
    ) -> "ParameterWindow":
        """A window for the parameters that have these first gradients.

        Raises:
            MemoryError: if it does not fit, with the numbers; nothing is allocated then.
        """
        owners = _assign(gradients, masks, options, {}, sharing)
        placements = _place(gradients, owners, masks, options, sharing)
        window = cls(placements, options, sharing=sharing, shards=shards)
        window.owners = owners
        return window

    def add(self, gradients: dict[Tensor, Tensor], masks: dict[Tensor, Tensor]) -> None:
        """Let in the parameters among these that have no columns yet.

        Raises:
            MemoryError: if they do not fit, with the numbers; nothing changes then.
        """
        new = {p: grad for p, grad in gradients.items() if p not in self.owners}
        if not new:
            return
        owners = _assign(new, masks, self.options, self.owners, self.sharing)
        placements = _place(new, owners, masks, self.options, self.sharing)
        self.owners.update(owners)
        self.placements.update(placements)
        for columns in distinct_columns(placements.values()):
            self.add_columns(columns)

    def shrink(self, masks: dict[Tensor, Tensor]) -> None:
        """Forget what these masks no longer keep; the rest is the window of the kept coordinates.

        Raises:
            MemoryError: if a smaller buffer does not fit beside the one that it replaces; nothing changes then.
        """
        placements: dict[Tensor, Placement] = {}
        for columns in self.columns:
            members = {p: placement for p, placement in self.placements.items() if placement.columns is columns}
            if isinstance(columns, DenseColumns) and not masks.keys().isdisjoint(members):
                placements |= self._without_masked(columns, members, masks)
            else:
                placements |= members
        for p, placement in placements.items():
            if isinstance(placement.columns, RowSparseColumns) and p in masks:
                placement.columns.keep_only(masks[p])
        self.placements = placements
        self.columns = distinct_columns(placements.values()) or self.columns
        for p in masks.keys() & self.owners.keys():
            owner, size = self.owners[p]
            self.owners[p] = (owner, min(size, int(masks[p].sum())))
        self.set_gram(self._sum([columns.gram(self.count) for columns in self.columns]))

    def _without_masked(
        self, columns: DenseColumns, members: dict[Tensor, Placement], masks: dict[Tensor, Tensor]
    ) -> dict[Tensor, Placement]:
        kept = {}  # positions within the placement
        for p, placement in members.items():
            mask = torch.ones(placement.shape, dtype=torch.bool) if p not in masks else masks[p]
            mask = mask.reshape(-1) if placement.keep is None else mask.reshape(-1)[placement.keep.to(mask.device)]
            kept[p] = mask.nonzero().squeeze(1)
        itemsize = columns.buffer_MD.dtype.itemsize
        sizes = {p: len(positions) for p, positions in kept.items()}
        words = f"{self.num_grads} gradients x {sum(sizes.values()):,} parameters that are kept"
        require_memory(self.num_grads * sum(sizes.values()) * itemsize, columns.device, words)
        positions_K = torch.cat([members[p].start + kept[p].to(columns.device) for p in members])
        smaller = columns.select(positions_K, self.count)
        placements, start = {}, 0
        for p, placement in members.items():
            keep = kept_positions(masks[p]) if p in masks else placement.keep
            placements[p] = Placement(smaller, placement.shape, start, sizes[p], keep)
            start += sizes[p]
        return placements

    def stored_gradients(self, p: Tensor) -> Tensor:
        """The gradients held of one parameter, oldest first, shape (count, p.numel()); zero where they are masked.

        Raises:
            KeyError: if the window has no columns of this parameter here.
        """
        placement = self.placements[p]
        order = (self.newest + 1 + torch.arange(self.count)) % self.count
        if isinstance(placement.columns, RowSparseColumns):
            return torch.stack([placement.columns.row(i) for i in order.tolist()])
        columns = slice(placement.start, placement.start + placement.size)
        grads_MK = placement.columns.buffer_MD[order.to(placement.columns.device), columns]
        if placement.keep is None:
            return grads_MK
        keep = placement.keep.to(grads_MK.device)
        return grads_MK.new_zeros(self.count, placement.shape.numel()).index_copy_(1, keep, grads_MK)

    def push_gradients(self, gradients: dict[Tensor, Tensor], masks: dict[Tensor, Tensor]) -> None:
        """Store one gradient for each parameter; zeros for those that have none now.

        Raises:
            MemoryError: if a table that was row-sparse no longer is and does not fit; nothing is stored then.
        """
        parts: dict[int, list[Any]] = {id(columns): [] for columns in self.columns}
        for p, placement in list(self.placements.items()):
            part = placement.part(gradients.get(p), p.device, masks.get(p))
            if (
                isinstance(placement.columns, RowSparseColumns)
                and len(part[0]) > ROW_SPARSE_DENSIFY * placement.shape[0]
            ):
                placement = self._densify(p, masks.get(p))
                parts[id(placement.columns)] = []
                part = placement.part(gradients[p], p.device, masks.get(p))
            parts[id(placement.columns)].append(part)
        # Parameters that share a dense buffer were placed in the order of its columns.
        self.push(
            [
                parts[id(columns)][0]
                if isinstance(columns, RowSparseColumns)
                else torch.cat(parts[id(columns)] or [torch.zeros(0)])
                for columns in self.columns
            ]
        )

    def _densify(self, p: Tensor, mask: Tensor | None) -> Placement:
        columns = self.placements[p].columns
        assert isinstance(columns, RowSparseColumns)
        keep = kept_positions(mask)
        dense = to_dense(columns, self.count, self.options["window_dtype"], keep)
        self.columns[self.columns.index(columns)] = dense
        self.placements[p] = Placement(dense, self.placements[p].shape, 0, dense.dim, keep)
        return self.placements[p]

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Any]:
        """The direction of each parameter with a gradient: a tensor of its shape, or (row numbers, values)."""
        weights_M = self.direction_weights(self.options["grad_decay"])
        dtype = self.combine_dtype(weights_M)
        combined: dict[int, Any] = {
            id(columns): columns.combine_rows(weights_M, dtype=dtype)
            if isinstance(columns, RowSparseColumns)
            else columns.combine(weights_M, dtype=dtype)
            for columns in self.columns
        }
        directions: dict[Tensor, Any] = {}
        for p, placement in self.placements.items():
            if p not in gradients:
                continue
            if isinstance(placement.columns, RowSparseColumns):
                directions[p] = tuple(part.to(p.device) for part in combined[id(placement.columns)])
                continue
            flat = combined[id(placement.columns)][placement.start : placement.start + placement.size].to(p.device)
            if placement.keep is not None:
                flat = flat.new_zeros(placement.shape.numel()).index_copy_(0, placement.keep, flat)
            directions[p] = flat.view(placement.shape)
        return directions if self.sharing is None else self._share(directions, gradients)

    def _share(self, directions: dict[Tensor, Any], gradients: dict[Tensor, Tensor]) -> dict[Tensor, Any]:
        """Every parameter's direction on every rank: each rank broadcasts those of its own."""
        dtype = torch.float64 if self.options["window_dtype"] == torch.float64 else torch.float32
        shared: dict[Tensor, Any] = {}
        for rank in range(dist.get_world_size(self.sharing)):
            owned = [p for p in gradients if self.owners[p][0] == rank]
            if not owned:
                continue
            sizes = [p.numel() for p in owned]
            if rank == dist.get_rank(self.sharing):
                flat = torch.cat([_dense(directions[p], p).reshape(-1).to(dtype) for p in owned])
            else:
                flat = torch.empty(sum(sizes), dtype=dtype, device=owned[0].device)
            dist.broadcast(flat, group=self.sharing, group_src=rank)
            shared.update({p: part.view(p.shape) for p, part in zip(owned, flat.split(sizes), strict=True)})
        return shared

    def state(self) -> dict[Tensor, dict[str, Any]]:
        """What the state of each parameter holds of the window: views of the buffers, no copies."""
        stores = {id(columns): i for i, columns in enumerate(self.columns)}
        states = {
            p: {
                **placement.state(self.num_grads),
                "window_store": stores[id(placement.columns)],
                "window_start": placement.start,
            }
            for p, placement in self.placements.items()
        }
        if states:
            next(iter(states.values())).update(
                gram=self.gram_MM,
                pushed=self.pushed,
                jitter_escalations=self.jitter_escalations,
                window_parameters=len(states),
            )
        return states


def _assign(
    new: dict[Tensor, Tensor],
    masks: dict[Tensor, Tensor],
    options: dict[str, Any],
    owners: dict[Tensor, tuple[int, int]],
    sharing: dist.ProcessGroup | None,
) -> dict[Tensor, tuple[int, int]]:
    """The rank that keeps the columns of each new parameter, and how many numbers a gradient has there.

    Largest first, to the rank with the least. Every rank sees the same gradients, so all come to the same end.
    """
    if sharing is None:
        return dict.fromkeys(new, (0, 0))
    load = [0] * dist.get_world_size(sharing)
    for owner, size in owners.values():
        load[owner] += size
    sizes = {p: stored_numbers(grad, masks.get(p), options["row_sparse"]) for p, grad in new.items()}
    assigned = {}
    for p in sorted(new, key=lambda p: -sizes[p]):
        owner = load.index(min(load))
        assigned[p] = (owner, sizes[p])
        load[owner] += sizes[p]
    return assigned


def _place(
    new: dict[Tensor, Tensor],
    owners: dict[Tensor, tuple[int, int]],
    masks: dict[Tensor, Tensor],
    options: dict[str, Any],
    sharing: dist.ProcessGroup | None,
) -> dict[Tensor, Placement]:
    """Columns for those new parameters that are this rank's."""
    rank = 0 if sharing is None else dist.get_rank(sharing)
    where = options["window_device"] or next(iter(new.values())).device
    return place(
        {p: grad for p, grad in new.items() if owners[p][0] == rank},
        masks,
        num_grads=options["num_grads"],
        dtype=options["window_dtype"],
        devices=[torch.device(device) for device in (where if isinstance(where, list) else [where])],
        row_sparse=options["row_sparse"],
    )


def _dense(direction: Any, p: Tensor) -> Tensor:
    if not isinstance(direction, tuple):
        return direction
    rows, values = direction
    return values.new_zeros(p.shape).index_copy_(0, rows, values)
