"""The facts of a model card as plain JSON: results of the runs, zeros of the weights, and sizes of the files.

`collect` gathers them, and `mfac_hf.hub.card` puts them into words. Nobody writes anything by hand in between.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from mfac_hf import __version__
from mfac_hf.hub.adapter import adapter_directory, base_of, describe_adapter, is_adapter
from mfac_hf.hub.architecture import describe_architecture
from mfac_hf.hub.companions import custom_architecture, read_configuration
from mfac_hf.hub.inventory import describe_weights, file_sizes
from mfac_hf.hub.run_records import MissingResultsError, read_run
from mfac_hf.sparse.directory import SPARSE_FILE

__all__ = ["CardOptions", "check_consistent", "collect", "is_worthwhile"]

# A model counts as sparse from this share of zeros; fewer come about by themselves.
SPARSE_FROM = 0.05
# By so much the sparsity of the weights may differ from the one that the run reports.
SPARSITY_TOLERANCE = 0.01
# A sparse file is pushed beside the ordinary one where it is smaller than this share of it.
WORTHWHILE = 0.9
_FILE_ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".tar", ".th", ".gguf")


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
        ValueError: the runs belong to different tasks or to other weights, or trained an adapter that is not there, or
            a dense one records a pruning.
    """
    if not runs:
        raise MissingResultsError("no result file: a card needs the results.json of at least one run")
    options = options or CardOptions()
    described = _describe(model, options)
    targets = described["weights"]["targets"]
    sparsity = targets["zeros"] / targets["numel"] if targets["numel"] else 0.0
    sparse = described["sparse"]
    read = [read_run(run, sparsity=sparsity if targets["numel"] else None, strict=strict) for run in runs]
    dense = [_read_dense(run) for run in options.dense]
    check_consistent(read, dense)
    if "adapter" not in described["model"] and any("parameters" in run for run in read):
        raise ValueError(
            "the run trained an adapter, and these weights are a whole model, maybe left in its directory by an "
            "earlier run: move them away, or give the directory of the adapter"
        )
    if again := [run["seed"] for run in dense if run in read]:
        raise ValueError(
            f"the run of seed {again[0]} is given as a result and as dense; leave it out of the dense ones"
        )
    if strict and sparse and not dense and any(run["dense_metrics"] is None for run in read):
        raise MissingResultsError(
            f"{sparsity:.1%} of the weights are zero, and the results of the dense model are missing: give its result "
            "files too (dense=..., --dense)"
        )
    if "adapter" not in described["model"]:
        _check_sparsity(read, sparsity)
    return {
        "name": options.name or (type(model).__name__ if isinstance(model, nn.Module) else Path(model).resolve().name),
        **described,
        "latency": None,
        "runs": read,
        "dense_runs": dense,
        "base_model": _hub_name(read[0]),
        "caveats": list(options.caveats),
        "license": options.license,
        "mfac_hf": __version__,
    }


def _describe(model: nn.Module | str | os.PathLike[str], options: CardOptions) -> dict[str, Any]:
    """Describe class, weights and files of a model, or of an adapter."""
    if is_adapter(model):
        with adapter_directory(model) as directory:
            adapter = describe_adapter(directory, base_of(model) if isinstance(model, nn.Module) else None)
        return {"model": adapter["model"], "sparse": False, "weights": adapter["weights"], "files": adapter["files"]}
    architecture = custom_architecture(_configuration(model)) if options.model_class is None else None
    if architecture is None:
        architecture = describe_architecture(model, options.model_class)
    weights = describe_weights(model)
    targets = weights["targets"]
    sparse = targets["zeros"] >= SPARSE_FROM * targets["numel"] > 0
    files = file_sizes(model, sparse)
    small = files.get(SPARSE_FILE)
    if small is not None and len(files) > 1 and not is_worthwhile(small, sum(files.values()) - small):
        del files[SPARSE_FILE]
    return {"model": architecture, "sparse": sparse, "weights": weights, "files": files}


def is_worthwhile(sparse: int, dense: int) -> bool:
    """Whether a sparse file of so many bytes is pushed beside ordinary files of so many bytes."""
    return sparse < WORTHWHILE * dense


def _configuration(model: nn.Module | str | os.PathLike[str]) -> dict[str, Any]:
    """Return the configuration of a model as plain JSON types; empty where it has none."""
    if isinstance(model, nn.Module):
        config: Any = getattr(model, "config", None)
        if not callable(getattr(config, "to_dict", None)):
            return {}
        return {**config.to_dict(), "architectures": [type(model).__name__]}
    path = Path(model) / "config.json"
    return read_configuration(path) if path.is_file() else {}


def _read_dense(source: Any) -> dict[str, Any]:
    """Read a result file of the model before pruning."""
    run = read_run(source)
    if run["pruning"] is not None:
        name = "a record that was given as dense" if isinstance(source, Mapping) else str(source)
        steps = run["pruning"]["steps"]
        reached = f" to a sparsity of {steps[-1]['sparsity']:.4f}" if steps and "sparsity" in steps[-1] else ""
        raise ValueError(
            f"{name} records a pruning{reached}, so it is none of the dense model: leave it out of the dense results"
        )
    return run


def _check_sparsity(runs: list[dict[str, Any]], sparsity: float) -> None:
    """Raise ValueError unless the runs pruned to the sparsity of the weights, or none of them pruned."""
    for number, run in enumerate(runs):
        steps = (run["pruning"] or {}).get("steps")
        if (run["pruning"] is None) != (runs[0]["pruning"] is None):
            raise ValueError(
                f"the result files do not belong together: of seeds {runs[0]['seed']} and {run['seed']} one records a "
                "pruning and the other none; results of the dense model belong to dense (dense=..., --dense)"
            )
        if steps and abs(steps[-1].get("sparsity", sparsity) - sparsity) > SPARSITY_TOLERANCE:
            which = "first result file" if number == 0 else f"result file of seed {run['seed']}"
            raise ValueError(
                f"the run pruned to {steps[-1]['sparsity']:.4f} and the weights have a sparsity of {sparsity:.4f}: "
                f"the {which} is not that of these weights"
            )


def check_consistent(runs: list[dict[str, Any]], dense: list[dict[str, Any]]) -> None:
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


def _hub_name(run: Mapping[str, Any]) -> str | None:
    """Return the name of the pretrained model if it can be one on the Hub, None if it is a file or directory."""
    base_model: str | None = run["base_model"]
    if base_model is None or run.get("base_model_is_local"):
        return None
    # Runs before these records said where the model came from: what looks like a path, or is one here, is none.
    if base_model.startswith((".", "/", "~")) or base_model.count("/") > 1 or base_model.endswith(_FILE_ENDINGS):
        return None
    if Path(base_model).exists():
        return None
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return None
    return base_model
