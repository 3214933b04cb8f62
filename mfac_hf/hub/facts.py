"""The facts of a model card as plain JSON: results of the runs, what the weights hold, sizes and latency.

`collect` gathers them, `mfac_hf.hub.card` puts them into words. Nothing in between is written by hand.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from mfac_hf import __version__
from mfac_hf.hub.inventory import describe_weights
from mfac_hf.hub.run_records import MissingResultsError, read_run
from mfac_hf.machine import cpu_name
from mfac_hf.sparse.files import SPARSE_FILE, dense_files, distinct, save_sparse
from mfac_hf.sparse.inference import SparseLinear, to_sparse_inference

__all__ = ["collect", "load_model", "measure_latency"]

Source = str | os.PathLike[str]
LATENCY_ROUNDS = 15
# A model counts as sparse from here on; less comes from single zeros that nobody put there.
SPARSE_FROM = 0.05


def collect(
    runs: Sequence[Any],
    *,
    model: nn.Module | Source,
    dense: Sequence[Any] = (),
    name: str | None = None,
    model_class: str | None = None,
    caveats: Sequence[str] = (),
    license: str | None = None,
    latency: bool = True,
    strict: bool = True,
) -> dict[str, Any]:
    """Gather what a card says.

    Args:
        runs: result files (or their contents), one for each seed; the first is the run whose weights ``model`` holds.
        model: these weights: a model, or a directory that ``save_pretrained`` wrote.
        dense: result files of the same task before pruning; needed where the weights are sparse, unless the runs
            recorded it themselves.
        name: the model's name; the directory's where it is left out.
        model_class: ``package.module.Class`` with ``from_pretrained``, where the configuration does not name one of
            transformers.
        caveats: what readers have to know about data and weights.
        license: licence identifier of the weights.
        latency: whether to time a forward pass on this machine, dense and, for sparse weights, with sparse layers.
        strict: whether results may not be missing; Trainer pushes models that nothing has evaluated yet, and their
            card says that.

    Returns:
        Plain JSON types: ``name``, ``model``, ``sparse``, ``weights``, ``files``, ``latency``, ``runs``,
        ``dense_runs``, ``base_model``, ``caveats``, ``license``, ``mfac_hf`` (the version that gathered them).

    Raises:
        MissingResultsError: no run, or a file that lacks results, or no dense result beside sparse weights.
        FileNotFoundError: a result file or the model is missing.
        ValueError: the runs are of different tasks or of other weights.
    """
    if not runs:
        raise MissingResultsError("no result file: a card needs the results.json of at least one run")
    architecture = _architecture(model, model_class)
    weights = describe_weights(model)
    targets = weights["targets"]
    sparsity = targets["zeros"] / targets["numel"] if targets["numel"] else 0.0
    read = [read_run(run, sparsity=sparsity, strict=strict) for run in runs]
    read_dense = [read_run(run) for run in dense]
    _check_consistent(read, read_dense)
    sparse = sparsity >= SPARSE_FROM
    if strict and sparse and not read_dense and any(run["dense_metrics"] is None for run in read):
        raise MissingResultsError(
            f"{sparsity:.1%} of the weights are zero, and the results of the dense model are missing: give its result "
            "files too (dense=..., --dense)"
        )
    steps = (read[0]["pruning"] or {}).get("steps")
    if steps and abs(steps[-1]["sparsity"] - sparsity) > 0.01:
        raise ValueError(
            f"the run pruned to {steps[-1]['sparsity']:.4f} and the weights have a sparsity of {sparsity:.4f}: the "
            "first result file is not that of these weights"
        )
    facts = {
        "name": name or (Path(model).resolve().name if not isinstance(model, nn.Module) else type(model).__name__),
        "model": architecture,
        "sparse": sparse,
        "weights": weights,
        "files": _file_sizes(model, sparse),
        "latency": None,
        "runs": read,
        "dense_runs": read_dense,
        "base_model": _hub_name(read[0]["base_model"]),
        "caveats": list(caveats),
        "license": license,
        "mfac_hf": __version__,
    }
    if latency:
        loaded = model if isinstance(model, nn.Module) else load_model(model, architecture["class"])
        facts["latency"] = measure_latency(loaded, sparse)
    return facts


def _hub_name(base_model: str | None) -> str | None:
    """The name of the pretrained model if it is one on the Hub, None if it is a directory here."""
    if base_model is None or Path(base_model).exists() or base_model.count("/") > 1:
        return None
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return None
    return base_model


def _check_consistent(runs: list[dict[str, Any]], dense: list[dict[str, Any]]) -> None:
    """Raise ValueError unless all runs answer the same question and differ in their seeds."""
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


def _architecture(model: nn.Module | Source, model_class: str | None) -> dict[str, Any]:
    """Class, library and task of the model."""
    if isinstance(model, nn.Module):
        kind = type(model)
        path = f"{kind.__module__}.{kind.__qualname__}"
    else:
        config = Path(model) / "config.json"
        named = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
        path = f"transformers.{named[0]}" if named else ""
    path = model_class or path
    if not path:
        raise ValueError(f"{model} does not say of which class it is: give model_class='package.module.Class'")
    name = path.rpartition(".")[2]
    if path.startswith("transformers."):
        from transformers.modelcard import TASK_MAPPING

        mappings: dict[str, Any] = dict(TASK_MAPPING)
        tasks = [task for task, names in mappings.items() if name in names.values()]
        return {"class": f"transformers.{name}", "library": "transformers", "task": tasks[0] if tasks else None}
    found = import_class(path)
    info = getattr(found, "_hub_mixin_info", None)
    return {"class": path, "library": "mfac_hf", "task": getattr(info and info.model_card_data, "pipeline_tag", None)}


def import_class(path: str) -> Any:
    """Import ``package.module.Class``.

    Raises:
        ValueError: there is no such class.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model class {path!r} cannot be imported: {error}") from error


def load_model(directory: Source, path: str) -> nn.Module:
    """Load a model for inference from a directory, through the class's ``from_pretrained`` or its sparse file."""
    from mfac_hf.sparse.files import find_weights, load_sparse

    kind = import_class(path)
    if [file.name for file in find_weights(directory)] == [SPARSE_FILE]:
        if not hasattr(kind, "config_class"):
            raise ValueError(
                f"{path} cannot be built from {directory}, which has the sparse file alone: add the dense one"
            )
        config = kind.config_class.from_pretrained(directory)
        return load_sparse(directory, kind(config)).eval()
    model: nn.Module = kind.from_pretrained(directory).eval()
    return model


def _file_sizes(model: nn.Module | Source, sparse: bool) -> dict[str, int]:
    """Bytes of the weight files, the sparse one as it would be written now."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, nn.Module):
            tensors = distinct(model.state_dict())[0].values()
            sizes = {"model.safetensors": sum(tensor.numel() * tensor.element_size() for tensor in tensors)}
        else:
            try:
                sizes = {path.name: path.stat().st_size for path in dense_files(model)}
            except FileNotFoundError:
                return {SPARSE_FILE: (Path(model) / SPARSE_FILE).stat().st_size}
        if sparse:
            sizes[SPARSE_FILE] = save_sparse(model, folder, sparse_only=True).stat().st_size
    return sizes


@torch.inference_mode()
def measure_latency(model: nn.Module, sparse: bool) -> dict[str, Any]:
    """Median seconds of a forward pass over one example, dense and sparse in turns, with the hardware.

    The example has 128 tokens (or as many as the model has positions), or one image of 3 x 32 x 32.
    """
    model = model.eval()
    config: Any = getattr(model, "config", None)
    device = next(model.parameters()).device
    if hasattr(config, "vocab_size"):
        length = min(128, getattr(config, "max_position_embeddings", 128))
        example = torch.randint(0, config.vocab_size, (1, length), device=device)
        what, tokens = f"1 x {length} tokens", length
    else:
        example = torch.randn(1, getattr(config, "num_channels", 3), 32, 32, device=device)
        what, tokens = "1 image of 32 x 32", 1
    contenders = {"dense": model}
    layers = 0
    if sparse:
        contenders["sparse"] = to_sparse_inference(model, tokens=tokens)
        layers = sum(isinstance(module, SparseLinear) for module in contenders["sparse"].modules())
    times: dict[str, list[float]] = {key: [] for key in contenders}
    for _ in range(LATENCY_ROUNDS + 1):
        for key, contender in contenders.items():
            started = time.perf_counter()
            contender(example)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[key].append(time.perf_counter() - started)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "example": what,
        "seconds": {key: statistics.median(spent[1:]) for key, spent in times.items()},  # the first one warms up
        "sparse_layers": layers,
        "calls": LATENCY_ROUNDS,
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
