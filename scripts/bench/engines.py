"""A model in the engines that could serve it on a CPU: PyTorch, ours, ONNX Runtime and OpenVINO, side by side.

The rows say how fast a batch is, as a ratio to PyTorch in float32 in the same run; and of a directory that ``mfac
prune`` made, also the accuracy that each engine reaches and the bytes of its files.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, EvalPrediction

from bench.common import seconds
from mfac_hf import save_sparse, to_sparse_inference
from mfac_hf.export import Engine, export_model, load_exported
from mfac_hf.sparse.inference import SparseLinear
from mfac_hf.storage import read_json
from mfac_hf.training.fine_tuned import load_fine_tuned

CPU = torch.device("cpu")
NOT_INSTALLED = "not installed"
TORCH = "torch float32"
# Layers with at least this share of zeros are read in OpenVINO's sparse form, where the processor can.
OPENVINO_SPARSE = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5}


def build_engines(model: nn.Module, tokens: int, folder: Path) -> dict[str, tuple[Engine | None, int | None]]:
    """Every contender with the bytes of its weights; None where its packages are missing.

    Args:
        model: in evaluation mode; it stays as it is.
        tokens: of a batch, for which sparse layers are chosen.
        folder: for the files of the engines, which have to stay.
    """
    sparse, half = to_sparse_inference(model, tokens=tokens), copy.deepcopy(model).bfloat16()
    size = save_sparse(model, folder / "sparse", sparse_only=True).stat().st_size
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    engines: dict[str, tuple[Engine | None, int | None]] = {
        TORCH: (_of(model), weights),
        "sparse": (_of(sparse), size),
        "torch bfloat16": (_of(half), weights // 2),
    }
    for title, export_format in (("ONNX Runtime", "onnx"), ("OpenVINO", "openvino")):
        for int8 in (False, True):
            name, path = f"{title}{' int8' if int8 else ''}", folder / f"{export_format}{int8}"
            try:
                report = export_model(model, path, export_format=export_format, int8=int8)
            except ImportError:
                engines[name] = (None, None)
                continue
            stored = sum(bytes_ for file, bytes_ in report["files"].items() if not file.endswith(".json"))
            engines[name] = (load_exported(path), stored)
            if export_format == "openvino" and int8:
                engines["OpenVINO int8, sparse weights"] = (load_exported(path, **OPENVINO_SPARSE), stored)
    return engines


def _of(model: nn.Module) -> Engine:
    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode():
            return {"logits": model(**inputs).logits}

    return run


def sparse_layers(model: nn.Module, tokens: int) -> int:
    """How many layers `to_sparse_inference` replaces."""
    return sum(isinstance(module, SparseLinear) for module in to_sparse_inference(model, tokens=tokens).modules())


def race(
    engines: Mapping[str, tuple[Engine | None, int | None]], inputs: Mapping[str, Tensor], rounds: int
) -> list[dict[str, Any]]:
    """Time each engine once in every round: medians, and the largest difference of its logits from PyTorch's."""
    runs: dict[str, Callable[[], Any]] = {
        name: (lambda engine=engine: engine(inputs)) for name, (engine, _) in engines.items() if engine is not None
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            times[name].append(seconds(run, CPU))
    medians = {name: statistics.median(spent[1:]) for name, spent in times.items()}  # the first one warms up
    expected = runs[TORCH]()["logits"]
    rows: list[dict[str, Any]] = []
    for name in engines:
        if name not in runs:
            rows.append({"contender": name, "seconds": NOT_INSTALLED, "speedup": NOT_INSTALLED})
            continue
        difference = float((runs[name]()["logits"].float() - expected).abs().max())
        speed = {"seconds": medians[name], "speedup": medians[TORCH] / medians[name]}
        rows.append({"contender": name, **speed, "max_output_difference": difference})
    return rows


def benchmark_served(
    directory: Path, rounds: int, shapes: tuple[tuple[int, int], ...] = ((1, 128), (8, 128))
) -> list[dict[str, Any]]:
    """Rows for a directory that ``mfac prune`` made: speed at each shape, accuracy on its task, bytes.

    Args:
        directory: with the model and its ``pruning.json``, which names task and data.
        rounds: times that each engine is timed.
        shapes: batch sizes and lengths.
    """
    record = read_json(directory / "pruning.json")
    tuned = load_fine_tuned(
        str(directory), record["task"], record["data"]["dataset"], max_seq_length=record["data"]["max_seq_length"]
    )
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    rows: list[dict[str, Any]] = []
    for batch, length in shapes:
        with tempfile.TemporaryDirectory() as folder:
            engines = build_engines(model, batch * length, Path(folder))
            ids = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
            inputs = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "token_type_ids": torch.zeros_like(ids),
            }
            found = race(engines, inputs, rounds)
            if not rows:
                metric = tuned.metric.removeprefix("eval_")
                scores = {name: _score(tuned, engine)[metric] for name, (engine, _) in engines.items() if engine}
            for row in found:
                name = row["contender"]
                row |= {"model": directory.name, "batch": batch, "length": length, "metric": metric}
                row |= {"score": scores.get(name, NOT_INSTALLED), "bytes": engines[name][1]}
            rows += found
    return rows


def _score(tuned: Any, engine: Engine) -> dict[str, float]:
    """The task's metrics of an engine on the evaluation examples."""
    logits, labels = [], []
    for batch in tuned.trainer.get_eval_dataloader():
        labels.append(batch.pop("labels").cpu())
        logits.append(engine({name: tensor.cpu() for name, tensor in batch.items()})["logits"].float())
    prediction = EvalPrediction(predictions=torch.cat(logits).numpy(), label_ids=torch.cat(labels).numpy())
    metrics: dict[str, float] = tuned.trainer.compute_metrics(prediction)
    return {name: float(np.asarray(value)) for name, value in metrics.items()}


def print_served(rows: list[dict[str, Any]]) -> None:
    """Print the rows of `benchmark_served` as a table."""
    print("| model | engine | batch x tokens | ms | times torch float32 | metric | MB |\n" + "| --- " * 7 + "|")
    for row in rows:
        shape = f"{row['batch']} x {row['length']}"
        if row["seconds"] == NOT_INSTALLED:
            print(f"| {row['model']} | {row['contender']} | {shape} | {NOT_INSTALLED} | | | |")
            continue
        print(
            f"| {row['model']} | {row['contender']} | {shape} | {1000 * row['seconds']:.1f} | {row['speedup']:.2f} | "
            f"{row['metric']} {100 * row['score']:.1f} | {row['bytes'] / 1e6:.1f} |"
        )
