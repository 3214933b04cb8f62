"""Linear algebra of the empirical Fisher matrix, on tensors alone."""

from mfac_hf.fisher.blocked import BlockedFisher
from mfac_hf.fisher.full import FullFisher
from mfac_hf.fisher.window import GradientWindow

__all__ = ["BlockedFisher", "FullFisher", "GradientWindow"]
