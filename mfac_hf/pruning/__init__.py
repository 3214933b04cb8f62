"""Sparse weights: masks and what keeps them."""

from mfac_hf.pruning.masks import masks_from_sparse_model

__all__ = ["masks_from_sparse_model"]
