"""Scripts from end to end, those of the revision on its own package: results, logs and weights."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from mfac_hf.training.arguments import OptimizerArguments
from scenarios.common import EMPIRICAL, identity, shared_data, without_times

__all__ = ["demo", "glue", "squad", "vision"]


def _run(root: Path, name: str, *flags: Any) -> None:
    """Run a script in this process."""
    path = root / "scripts" / name
    with mock.patch.object(sys, "argv", [str(path), *map(str, flags)]), contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(path), run_name="__main__")


def _results(path: Path) -> Any:
    """The measured part of a result file: arguments and versions are the revision's own."""
    record = json.loads(path.read_text())
    return without_times({key: record[key] for key in ("results", "rows") if key in record})


def demo(root: Path, folder: Path, exchange: Path) -> Any:
    """The demonstration, shortened."""
    flags = ["--steps", 30, "--batch_size", 8, "--num_validation", 64, "--seeds", 1]
    _run(root, "demo.py", *flags, "--output_dir", folder)
    return _results(folder / "results.json")


def vision(root: Path, folder: Path, exchange: Path) -> Any:
    """Training and gradual pruning on scikit-learn's digits, both with M-FAC."""
    common = ["--model", "resnet20", "--progress", "false", "--batchsize", 256, "--optim", "mfac"]
    dense = folder / "dense.pth"
    _run(root, "train_vision.py", *common, "--nepochs", 1, "--ngrads", 8, "--save", dense)
    pruning = ["--nepochs", 1, "--sparsities", 0.6, "--nrecomps", 1, "--blocksize", 16, "--bn_images", 64]
    pruning += [
        "--prun_batchsize",
        2,
        "--ngrads_schedule",
        8,
        *(f"--{name}={value}" for name, value in EMPIRICAL.items()),
    ]
    _run(root, "prune_vision.py", *common, *pruning, "--checkpoint", dense, "--prefix", folder / "pruned")
    weights = torch.load(folder / "pruned-last.pth", weights_only=False)
    return {
        "rows": _results(folder / "pruned.json"),
        "dense": torch.load(dense, weights_only=False),
        "pruned": weights,
    }


def glue(root: Path, folder: Path, exchange: Path) -> Any:
    """SST-2 with gradual pruning."""
    flags = ["--dataset_name", "glue", "--task_name", "sst2", "--max_seq_length", 32, "--optim_name", "mfac"]
    flags += [f"--{name}={value}" for name, value in identity(OptimizerArguments).items()]
    return _fine_tune(root, folder, exchange, "run_glue.py", flags)


def squad(root: Path, folder: Path, exchange: Path) -> Any:
    """SQuAD with gradual pruning."""
    flags = ["--dataset_name", "squad", "--max_seq_length", 128, "--doc_stride", 32, "--optim_name", "adamw"]
    return _fine_tune(root, folder, exchange, "run_squad.py", flags)


def _fine_tune(root: Path, folder: Path, exchange: Path, script: str, flags: list[Any]) -> Any:
    """Twelve steps on the first examples, pruning twice."""
    shared = shared_data()
    if shared is None:
        return None
    flags[1] = shared / flags[1]
    flags += ["--model_name_or_path", shared / "models" / "bert-tiny-mlm", "--do_train", "--do_eval", "--use_cpu"]
    flags += ["--max_train_samples", 96, "--max_eval_samples", 64, "--per_device_train_batch_size", 8]
    flags += ["--max_steps", 12, "--learning_rate", 1e-3, "--num_grads", 8, "--report_to", "none"]
    flags += [
        "--sparsity",
        0.6,
        "--prune_end",
        8,
        "--prune_every",
        4,
        "--prune_num_grads",
        8,
        "--prune_block_size",
        32,
    ]
    flags += [f"--prune_{name}={value}" for name, value in EMPIRICAL.items()]
    flags += ["--recomputations", 1, "--save_strategy", "no", "--disable_tqdm", "true", "--output_dir", folder / "out"]
    _run(root, script, *flags, "--cache_dir", exchange / "datasets", "--dataloader_pin_memory", "false")
    return {
        "results": _results(folder / "out" / "results.json"),
        "weights": load_file(folder / "out" / "model.safetensors"),
    }
