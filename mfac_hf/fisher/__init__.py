"""Linear algebra of the empirical Fisher matrix, on tensors alone."""

from mfac_hf.fisher.window import GradientWindow

__all__ = ["GradientWindow"]
