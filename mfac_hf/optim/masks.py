"""Masks of parameters: what they have to be, and the columns of the window that they leave."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from mfac_hf.fisher.columns import ColumnStore, DenseColumns
from mfac_hf.memory import require_memory
from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.placement import DensePlacement, Placement, kept_positions
from mfac_hf.optim.sharded import is_sharded

__all__ = ["check_masks", "check_masks_have_parameters", "check_only_shrink", "shrink_stores"]


def check_masks(masks: Mapping[Tensor, Tensor], groups: list[dict[str, Any]]) -> None:
    """Raise a ValueError unless these are bool tensors of the shapes of parameters in the groups."""
    if not isinstance(masks, Mapping):
        raise ValueError(f"masks is {masks!r:.80}; expected a dictionary {{parameter: bool tensor of its shape}}")
    known = {p for group in groups for p in group["params"]}
    for parameter, mask in masks.items():
        if not isinstance(parameter, Tensor) or not isinstance(mask, Tensor):
            raise ValueError(
                f"masks maps {parameter!r:.80} to {mask!r:.80}; expected a parameter (not its name) and a bool tensor"
            )
        if parameter not in known:
            raise ValueError(
                f"a mask for a parameter of shape {tuple(parameter.shape)} that this optimizer does not have"
            )
        if is_sharded(parameter) or is_sharded(mask):
            raise ValueError(
                f"a mask for a parameter of shape {tuple(parameter.shape)} that is sharded: MFAC takes masks of whole "
                "parameters. Prune with process_group=... in place of FSDP2, or before sharding and without masks"
            )
        if mask.shape != parameter.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} and dtype {mask.dtype} for a parameter of shape "
                f"{tuple(parameter.shape)}; expected a bool tensor of the parameter's shape, True = keep"
            )


def check_masks_have_parameters(masks: Mapping[Tensor, Tensor], held: Collection[int], *, replaced: bool) -> None:
    """Raise a ValueError if a masked parameter has left the groups and others have come in its place.

    Args:
        masks: of the optimizer.
        held: ids of the parameters in the groups now.
        replaced: whether some of these came without `MFAC.add_param_group`.
    """
    lost = [p for p in masks if id(p) not in held]
    if lost and replaced:
        raise ValueError(
            f"the mask of a parameter of shape {tuple(lost[0].shape)} has lost its parameter: others took its place "
            "in the groups, as FSDP2 replaces parameters by sharded ones, and masked weights would be trained. Build "
            "MFAC with the parameters that are trained and their masks; masks of sharded parameters are not supported"
        )


def check_only_shrink(masks: Mapping[Tensor, Tensor], old: Mapping[Tensor, Tensor]) -> None:
    """Raise a ValueError if a mask keeps coordinates that an older one of the same parameter masks."""
    for p, kept in old.items():
        back = int((masks[p] & ~kept).sum()) if p in masks else 0
        if back:
            raise ValueError(
                f"the new mask of a parameter of shape {tuple(p.shape)} keeps {back} coordinates that are masked "
                "already; masks only ever shrink. Build a new MFAC to bring them back"
            )


def shrink_stores(
    members: Mapping[ColumnStore, Mapping[Tensor, Placement]],
    masks: Mapping[Tensor, Tensor],
    count: int,
    options: ParameterWindowOptions,
) -> tuple[dict[Tensor, Placement], list[tuple[ColumnStore, DenseColumns, Tensor]]]:
    """New dense stores for those of which masks drop columns; nothing changes yet.

    Args:
        members: the parameters of each store, in the order of its columns.
        masks: {parameter: bool tensor of its shape, True = keep}; other parameters keep all their columns.
        count: gradients held.
        options: num_grads, window_dtype and metric.

    Returns:
        The placements of all parameters then; and for each store that is replaced the old one, the new one, and the
        positions in the old one that it keeps.

    Raises:
        MemoryError: if a new store does not fit beside the old one.
    """
    placements: dict[Tensor, Placement] = {}
    replaced: list[tuple[ColumnStore, DenseColumns, Tensor]] = []
    for columns, parameters in members.items():
        dense = {p: placement for p, placement in parameters.items() if isinstance(placement, DensePlacement)}
        if masks.keys().isdisjoint(dense):
            placements |= parameters
        else:
            smaller, fewer, positions = _without_masked(dense, masks, count, options)
            placements |= fewer
            replaced.append((columns, smaller, positions))
    return placements, replaced


def _without_masked(
    members: Mapping[Tensor, DensePlacement],
    masks: Mapping[Tensor, Tensor],
    count: int,
    options: ParameterWindowOptions,
) -> tuple[DenseColumns, dict[Tensor, Placement], Tensor]:
    """The columns that masks keep, in a new store: the store, the placements in it, and the positions in the old one.

    Args:
        members: placements of all parameters that share one dense store, in the order of their columns.
        masks: {parameter: bool tensor of its shape, True = keep}; other parameters keep all their columns.
        count: gradients held.
        options: num_grads, window_dtype and metric.

    Raises:
        MemoryError: if the new store does not fit beside the old one.
    """
    columns = next(iter(members.values())).columns
    kept = {p: _kept_columns(placement, masks.get(p)) for p, placement in members.items()}
    dim = sum(len(positions) for positions in kept.values())
    words = f"{options.num_grads} gradients x {dim:,} parameters that are kept"
    require_memory(dim * options.column_bytes, columns.device, words)
    positions = torch.cat([members[p].start + kept[p].to(columns.device) for p in members])
    smaller = columns.select(positions, count)
    placements: dict[Tensor, Placement] = {}
    start = 0
    for p, placement in members.items():
        keep = kept_positions(masks[p]) if p in masks else placement.keep
        placements[p] = DensePlacement(smaller, placement.shape, start, len(kept[p]), keep)
        start += len(kept[p])
    return smaller, placements, positions


def _kept_columns(placement: DensePlacement, mask: Tensor | None) -> Tensor:
    """Which of a parameter's columns a mask keeps, counted from its first one."""
    if mask is None:
        mask = torch.ones(placement.shape, dtype=torch.bool)
    flat = mask.reshape(-1)
    return (flat if placement.keep is None else flat[placement.keep.to(flat.device)]).nonzero().squeeze(1)
