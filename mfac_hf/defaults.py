"""Default settings that the library, the scripts and the command line share; importing them costs no torch."""

from typing import Any

__all__ = [
    "MFAC_DEFAULTS",
    "MFAC_METRIC",
    "PAPER_PRUNING_DAMPING",
    "PRUNING_DAMPING_TEXT",
    "RELATIVE_PRUNING_DAMPING",
    "TOUCHED_EMBEDDING_ROWS",
    "defaults_of",
]

# Of `mfac_hf.MFAC`.
MFAC_METRIC = "adam"

# By metric, with the options that belong to that metric alone. Adam's are AdamW's, beside a small window: on the
# demo's task, 8 gradients and damping 1 learned as much as any other of 20 variants, and alike with every seed
# (benchmarks/window-variants.md). The identity's are those of the published runs.
MFAC_DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {
        "lr": 1e-3,
        "num_grads": 8,
        "window_dtype": "bfloat16",
        "damping": 1.0,
        "weight_decay": 0.01,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "nesterov": True,
    },
    "identity": {
        "lr": 1e-4,
        "num_grads": 1024,
        "window_dtype": "float32",
        "damping": 1e-6,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "decoupled_weight_decay": False,
        "normalize": "num_grads",
        "grad_decay": 0.0,
    },
}


def defaults_of(metric: str) -> dict[str, Any]:
    """The defaults of a metric.

    Raises:
        ValueError: the metric is unknown.
    """
    if not isinstance(metric, str) or metric not in MFAC_DEFAULTS:
        raise ValueError(f"metric is {metric!r}; expected one of {', '.join(map(repr, MFAC_DEFAULTS))}")
    return MFAC_DEFAULTS[metric]


# Of `mfac_hf.prune_one_shot` and the callback. Scaled gradients are of one length within a model, and of another in
# the next: their damping counts in units of their mean squared entry. The empirical Fisher has the paper's number.
RELATIVE_PRUNING_DAMPING = 0.03
PAPER_PRUNING_DAMPING = 1e-5
PRUNING_DAMPING_TEXT = (
    f"{RELATIVE_PRUNING_DAMPING:g} of the mean squared entry of a gradient (scaled), "
    f"{PAPER_PRUNING_DAMPING:g} (empirical)"
)

# Of `mfac_hf.memory_estimate`: rows of an embedding table that one batch looks up.
TOUCHED_EMBEDDING_ROWS = 512
