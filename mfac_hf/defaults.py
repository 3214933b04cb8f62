"""Default settings that the library, the scripts and the command line share; importing them costs no torch."""

from typing import Any

__all__ = [
    "MFAC_DAMPING",
    "MFAC_DEFAULTS",
    "MFAC_LEARNING_RATE",
    "MFAC_METRIC",
    "MFAC_NUM_GRADS",
    "TOUCHED_EMBEDDING_ROWS",
]

# Of `mfac_hf.MFAC`.
MFAC_METRIC = "adam"

# Of the identity metric: those of the published runs.
MFAC_LEARNING_RATE = 1e-4
MFAC_NUM_GRADS = 1024
MFAC_DAMPING = 1e-6

# By metric, with the options that belong to that metric alone. Adam's are AdamW's, beside a small window.
MFAC_DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {
        "lr": 1e-3,
        "num_grads": 16,
        "damping": 0.3,
        "weight_decay": 0.01,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
    },
    "identity": {
        "lr": MFAC_LEARNING_RATE,
        "num_grads": MFAC_NUM_GRADS,
        "damping": MFAC_DAMPING,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "decoupled_weight_decay": False,
        "normalize": "num_grads",
        "grad_decay": 0.0,
    },
}

# Of `mfac_hf.memory_estimate`: rows of an embedding table that one batch looks up.
TOUCHED_EMBEDDING_ROWS = 512
