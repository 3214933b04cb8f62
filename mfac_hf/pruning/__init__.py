"""Sparse weights: masks and what keeps them."""

from mfac_hf.pruning.masks import masks_from_sparse_model
from mfac_hf.pruning.schedule import SparsitySchedule

__all__ = ["SparsitySchedule", "masks_from_sparse_model"]
