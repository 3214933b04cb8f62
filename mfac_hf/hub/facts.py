"""The facts of a model card as plain JSON: results of the runs, zeros of the weights, and sizes of the files.

`collect` gathers them, and `mfac_hf.hub.card` puts them into words. Nobody writes anything by hand in between.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from mfac_hf import __version__
from mfac_hf.hub.architecture import describe_architecture
from mfac_hf.hub.inventory import describe_weights, file_sizes
from mfac_hf.hub.run_records import MissingResultsError, read_run

__all__ = ["CardOptions", "collect"]

# A model counts as sparse from this share of zeros; fewer come about by themselves.
SPARSE_FROM = 0.05
# By so much the sparsity of the weights may differ from the one that the run reports.
SPARSITY_TOLERANCE = 0.01


@dataclass(frozen=True)
class CardOptions:
    """Facts of a card that neither the runs nor the weights tell.

    Attributes:
        name: the model's name; None for that of its directory or class.
        model_class: ``package.module.Class`` with ``from_pretrained``, where the configuration names no class of
            transformers.
        dense: result files (or their contents) of the model before pruning; sparse weights need them, unless the
            runs measured the dense model themselves.
        caveats: sentences that readers have to know about data and weights.
        license: licence identifier of the weights.
    """

    name: str | None = None
    model_class: str | None = None
    dense: Sequence[Any] = ()
    caveats: Sequence[str] = ()
    license: str | None = None


def collect(
    runs: Sequence[Any],
    *,
    model: nn.Module | str | os.PathLike[str],
    options: CardOptions | None = None,
    strict: bool = True,
) -> dict[str, Any]:
    """Gather the facts of a card, without the latency (`mfac_hf.hub.latency.with_latency` adds it).

    Args:
        runs: result files (or their contents), one for each seed; the first is that of the weights in ``model``.
        model: a model, or a directory that ``save_pretrained`` wrote.
        options: facts that neither of them tells.
        strict: refuse runs without results. Trainer pushes models that nobody has evaluated yet; their cards say so.

    Returns:
        Plain JSON types: ``name``, ``model``, ``sparse``, ``weights``, ``files``, ``latency`` (None), ``runs``,
        ``dense_runs``, ``base_model``, ``caveats``, ``license``, ``mfac_hf`` (the version that gathered them).

    Raises:
        MissingResultsError: there is no run, a file lacks results, or sparse weights lack dense results.
        FileNotFoundError: a result file or the model is missing.
        ValueError: the runs belong to different tasks or to other weights.
    """
    if not runs:
        raise MissingResultsError("no result file: a card needs the results.json of at least one run")
    options = options or CardOptions()
    architecture = describe_architecture(model, options.model_class)
    weights = describe_weights(model)
    targets = weights["targets"]
    sparsity = targets["zeros"] / targets["numel"] if targets["numel"] else 0.0
    sparse = sparsity >= SPARSE_FROM
    read = [read_run(run, sparsity=sparsity, strict=strict) for run in runs]
    dense = [read_run(run) for run in options.dense]
    _check_consistent(read, dense)
    if strict and sparse and not dense and any(run["dense_metrics"] is None for run in read):
        raise MissingResultsError(
            f"{sparsity:.1%} of the weights are zero, and the results of the dense model are missing: give its result "
            "files too (dense=..., --dense)"
        )
    _check_sparsity(read[0], sparsity)
    return {
        "name": options.name or (type(model).__name__ if isinstance(model, nn.Module) else Path(model).resolve().name),
        "model": architecture,
        "sparse": sparse,
        "weights": weights,
        "files": file_sizes(model, sparse),
        "latency": None,
        "runs": read,
        "dense_runs": dense,
        "base_model": _hub_name(read[0]["base_model"]),
        "caveats": list(options.caveats),
        "license": options.license,
        "mfac_hf": __version__,
    }


def _check_sparsity(run: dict[str, Any], sparsity: float) -> None:
    """Raise ValueError unless the run pruned to the sparsity of the weights."""
    steps = (run["pruning"] or {}).get("steps")
    if steps and abs(steps[-1]["sparsity"] - sparsity) > SPARSITY_TOLERANCE:
        raise ValueError(
            f"the run pruned to {steps[-1]['sparsity']:.4f} and the weights have a sparsity of {sparsity:.4f}: the "
            "first result file is not that of these weights"
        )


def _check_consistent(runs: list[dict[str, Any]], dense: list[dict[str, Any]]) -> None:
    """Raise ValueError unless all runs measure the same thing, with different seeds."""
    first = runs[0]
    for run in (*runs, *dense):
        for key in ("task", "dataset", "split"):
            ours, theirs = (r["dataset"]["id"] if key == "dataset" and r["dataset"] else r[key] for r in (first, run))
            if ours != theirs:
                raise ValueError(f"the result files do not belong together: {key} {ours!r} and {theirs!r}")
        if run["metrics"].keys() != first["metrics"].keys():
            raise ValueError(
                f"the result files have different metrics: {list(first['metrics'])}, {list(run['metrics'])}"
            )
    for group in (runs, dense):
        seeds = [run["seed"] for run in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"the result files repeat a seed: {seeds}; give each run once")


def _hub_name(base_model: str | None) -> str | None:
    """Return the name of the pretrained model if it can be one on the Hub, None if it is a directory."""
    if base_model is None or Path(base_model).exists() or base_model.count("/") > 1:
        return None
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return None
    return base_model
