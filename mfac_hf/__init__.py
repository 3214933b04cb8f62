"""Second-order fine-tuning and pruning for Hugging Face transformers, after M-FAC."""

from mfac_hf.memory import MemoryEstimate, memory_estimate
from mfac_hf.optim import MFAC

__version__ = "0.1.0"

__all__ = ["MFAC", "MemoryEstimate", "__version__", "memory_estimate"]
