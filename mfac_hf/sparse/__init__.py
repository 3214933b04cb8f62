"""Sparse files, and inference with sparse weights."""

from mfac_hf.sparse.files import load_sparse, save_sparse
from mfac_hf.sparse.format import DamagedFileError
from mfac_hf.sparse.inference import to_sparse_inference

__all__ = ["DamagedFileError", "load_sparse", "save_sparse", "to_sparse_inference"]
