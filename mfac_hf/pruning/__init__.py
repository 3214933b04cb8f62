"""Pruning: which weights can go, how the others make up for them, and masks that keep pruned weights at zero."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mfac_hf.pruning.engine import prune_to
    from mfac_hf.pruning.masks import MaskSet, masks_from_sparse_model
    from mfac_hf.pruning.oneshot import prune_one_shot
    from mfac_hf.pruning.options import PruningOptions, PruningReport
    from mfac_hf.pruning.schedule import SparsitySchedule
    from mfac_hf.pruning.targets import find_targets, left_out
    from mfac_hf.pruning.trainer.callback import MFACPruningCallback
    from mfac_hf.pruning.trainer.distillation import Distillation

# Imported when first asked for: options can be read without torch, and the core does not import the Trainer callback,
# which stands above model cards.
_MODULES = {
    "Distillation": "mfac_hf.pruning.trainer.distillation",
    "MFACPruningCallback": "mfac_hf.pruning.trainer.callback",
    "MaskSet": "mfac_hf.pruning.masks",
    "PruningOptions": "mfac_hf.pruning.options",
    "PruningReport": "mfac_hf.pruning.options",
    "SparsitySchedule": "mfac_hf.pruning.schedule",
    "find_targets": "mfac_hf.pruning.targets",
    "left_out": "mfac_hf.pruning.targets",
    "masks_from_sparse_model": "mfac_hf.pruning.masks",
    "prune_one_shot": "mfac_hf.pruning.oneshot",
    "prune_to": "mfac_hf.pruning.engine",
}

__all__ = [
    "Distillation",
    "MFACPruningCallback",
    "MaskSet",
    "PruningOptions",
    "PruningReport",
    "SparsitySchedule",
    "find_targets",
    "left_out",
    "masks_from_sparse_model",
    "prune_one_shot",
    "prune_to",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
