"""The optimizer: `MFAC`, its window over the parameters, and its saved state."""

from mfac_hf.optim.mfac import MFAC

__all__ = ["MFAC"]
