"""Sparse files and sparse inference of a random BERT-base, pruned by magnitude.

A trained model of the same shape and sparsity has files of the same sizes. Latencies stand beside what a user would
try first (`bench.engines`), all dense and with as many threads.
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from bench.common import seconds
from bench.engines import CPU, NOT_INSTALLED, build_engines, race, sparse_layers
from mfac_hf import load_sparse, save_sparse

SPARSITIES = (0.8, 0.9, 0.95, 0.97)
LATENCY_SPARSITIES = (0.9, 0.95)
SHAPES = ((1, 128), (8, 128))
MIB = 2**20

# Runs in a process of its own, so that nothing but the loading counts.
PEAK_MEMORY = """
import sys
from pathlib import Path
from mfac_hf import load_sparse
from mfac_hf.sparse.files import SPARSE_FILE

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = peak()
load_sparse(sys.argv[1])
print(peak() - before)
"""


def sparse_bert(sparsity: float, **config: Any) -> BertForSequenceClassification:
    """Make a random BERT and zero the smallest weights of each encoder matrix; in evaluation mode."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**config)).eval()
    with torch.no_grad():
        for module in model.bert.encoder.modules():
            if isinstance(module, nn.Linear):
                threshold = np.quantile(module.weight.abs().numpy(), sparsity)
                module.weight[module.weight.abs() <= threshold] = 0
    return model


def benchmark_sizes(rounds: int, sparsities: tuple[float, ...] = SPARSITIES, **config: Any) -> list[dict[str, Any]]:
    """Measure bytes on disk, seconds to save and load, and peak memory while loading; a row for each sparsity."""
    return [{"sparsity": sparsity, **_files(sparse_bert(sparsity, **config), rounds)} for sparsity in sparsities]


def _files(model: BertForSequenceClassification, rounds: int) -> dict[str, Any]:
    """Measure the files of one model, dense and sparse."""
    with tempfile.TemporaryDirectory() as folder:
        dense_dir, sparse_dir = Path(folder, "dense"), Path(folder, "sparse")
        dense, sparse = dense_dir / "model.safetensors", sparse_dir / "sparse.safetensors"
        runs: dict[str, Callable[[], Any]] = {
            "dense_save": lambda: model.save_pretrained(dense_dir),
            "save": lambda: save_sparse(model, sparse_dir, sparse_only=True),
            # cloned, because load_file maps the file and reads nothing yet
            "dense_load": lambda: {name: tensor.clone() for name, tensor in load_file(dense).items()},
            "load": lambda: load_sparse(sparse_dir),
        }
        times = {key: statistics.median(seconds(run, CPU) for _ in range(rounds)) for key, run in runs.items()}
        return {
            "dense_bytes": dense.stat().st_size,
            "sparse_bytes": sparse.stat().st_size,
            "ratio": dense.stat().st_size / sparse.stat().st_size,
            "zstd_bytes": _zstd_bytes(dense),
            "csr_bytes": sum(map(_csr_bytes, model.state_dict().values())),
            **{f"{key}_seconds": spent for key, spent in times.items()},
            "load_peak_bytes": _load_peak(sparse_dir),
            "largest_tensor_bytes": max(t.numel() * t.element_size() for t in model.parameters()),
        }


def _zstd_bytes(path: Path) -> int | str:
    """Return the size of a file after zstd at its default level."""
    if importlib.util.find_spec("zstandard") is None:
        return NOT_INSTALLED
    import zstandard

    return len(zstandard.ZstdCompressor().compress(path.read_bytes()))


def _csr_bytes(tensor: Tensor) -> int:
    """Return the bytes with csr alone: 16-bit columns and 32-bit rows for each matrix that is mostly zeros."""
    kept = int(tensor.count_nonzero())
    if tensor.ndim != 2 or 2 * kept > tensor.numel():
        return tensor.numel() * tensor.element_size()
    return kept * (tensor.element_size() + 2) + 4 * (len(tensor) + 1)


def _load_peak(directory: Path) -> int | None:
    """Return by how much loading a sparse file raises a process's peak memory; None where the system does not say."""
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, "-c", PEAK_MEMORY, str(directory)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_sizes(rows: list[dict[str, Any]]) -> None:
    """Print the rows of `benchmark_sizes` as a table."""
    print("| sparsity | dense MB | sparse MB | ratio | zstd of dense | csr alone | save s (dense) | load s (dense) | "
          "peak MiB while loading: dense + one tensor | measured |")  # fmt: skip
    print("| --- " * 10 + "|")
    for row in rows:
        zstd = row["zstd_bytes"] if isinstance(row["zstd_bytes"], str) else f"{row['zstd_bytes'] / 1e6:.1f}"
        peak = "unknown" if row["load_peak_bytes"] is None else f"{row['load_peak_bytes'] / MIB:.0f}"
        print(
            f"| {row['sparsity']:.0%} | {row['dense_bytes'] / 1e6:.1f} | {row['sparse_bytes'] / 1e6:.1f} | "
            f"{row['ratio']:.2f} | {zstd} | {row['csr_bytes'] / 1e6:.1f} | {row['save_seconds']:.2f} "
            f"({row['dense_save_seconds']:.2f}) | {row['load_seconds']:.2f} ({row['dense_load_seconds']:.2f}) | "
            f"{(row['dense_bytes'] + row['largest_tensor_bytes']) / MIB:.0f} | {peak} |"
        )


def benchmark_inference(
    rounds: int,
    sparsities: tuple[float, ...] = LATENCY_SPARSITIES,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    **config: Any,
) -> list[dict[str, Any]]:
    """Time a whole forward pass of each contender, once in every round; medians, a row for each."""
    rows = []
    for sparsity in sparsities:
        model = sparse_bert(sparsity, **config)
        for batch, length in shapes:
            case = {"sparsity": sparsity, "batch": batch, "length": length}
            rows += [{**case, **row} for row in _latencies(model, batch, length, rounds)]
    return rows


def _latencies(model: BertForSequenceClassification, batch: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """Time the contenders on one model and one shape of inputs."""
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with tempfile.TemporaryDirectory() as folder:
        rows = race(build_engines(model, batch * length, Path(folder)), inputs, rounds)
    rows[1]["sparse_layers"] = sparse_layers(model, batch * length)
    return rows


def print_inference(rows: list[dict[str, Any]]) -> None:
    """Print the rows of `benchmark_inference` as a table."""
    print("| sparsity | batch x tokens | contender | ms | times torch float32 | |")
    print("| --- " * 6 + "|")
    for row in rows:
        if row["seconds"] == NOT_INSTALLED:
            figures = f"{NOT_INSTALLED} | "
        else:
            figures = f"{1000 * row['seconds']:.1f} | {row['speedup']:.2f}"
        note = ""
        if "sparse_layers" in row:
            note = f"{row['sparse_layers']} sparse layers, output differs by {row['max_output_difference']:.1e}"
        print(
            f"| {row['sparsity']:.0%} | {row['batch']} x {row['length']} | {row['contender']} | {figures} | {note} |"
        )
