"""Second-order fine-tuning and pruning for Hugging Face transformers, after M-FAC."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mfac_hf.hub.push import push_to_hub
    from mfac_hf.hub.trainer_card import attach_card
    from mfac_hf.memory import MemoryEstimate, memory_estimate
    from mfac_hf.optim.mfac import MFAC
    from mfac_hf.planner import Machine, RankPlan, plan_ranks
    from mfac_hf.pruning.oneshot import prune_one_shot
    from mfac_hf.pruning.schedule import SparsitySchedule
    from mfac_hf.pruning.trainer.callback import MFACPruningCallback
    from mfac_hf.sparse.files import load_sparse, save_sparse, to_sparse_inference

__version__ = "0.2.0"

# Imported when first asked for, so that the command line's --help need not wait for torch.
_MODULES = {
    "MFAC": "mfac_hf.optim.mfac",
    "MFACPruningCallback": "mfac_hf.pruning.trainer.callback",
    "Machine": "mfac_hf.planner",
    "MemoryEstimate": "mfac_hf.memory",
    "RankPlan": "mfac_hf.planner",
    "SparsitySchedule": "mfac_hf.pruning.schedule",
    "attach_card": "mfac_hf.hub.trainer_card",
    "load_sparse": "mfac_hf.sparse.files",
    "memory_estimate": "mfac_hf.memory",
    "plan_ranks": "mfac_hf.planner",
    "prune_one_shot": "mfac_hf.pruning.oneshot",
    "push_to_hub": "mfac_hf.hub.push",
    "save_sparse": "mfac_hf.sparse.files",
    "to_sparse_inference": "mfac_hf.sparse.files",
}

__all__ = [
    "MFAC",
    "MFACPruningCallback",
    "Machine",
    "MemoryEstimate",
    "RankPlan",
    "SparsitySchedule",
    "__version__",
    "attach_card",
    "load_sparse",
    "memory_estimate",
    "plan_ranks",
    "prune_one_shot",
    "push_to_hub",
    "save_sparse",
    "to_sparse_inference",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
