"""Pruning: which weights can go, what the others do about it, and the masks that keep them away."""

from mfac_hf.pruning.masks import MaskSet, masks_from_sparse_model
from mfac_hf.pruning.oneshot import prune_one_shot, prune_to
from mfac_hf.pruning.options import PruningOptions, PruningReport
from mfac_hf.pruning.schedule import SparsitySchedule
from mfac_hf.pruning.targets import find_targets
from mfac_hf.pruning.trainer.callback import MFACPruningCallback
from mfac_hf.pruning.trainer.distillation import Distillation

__all__ = [
    "Distillation",
    "MFACPruningCallback",
    "MaskSet",
    "PruningOptions",
    "PruningReport",
    "SparsitySchedule",
    "find_targets",
    "masks_from_sparse_model",
    "prune_one_shot",
    "prune_to",
]
