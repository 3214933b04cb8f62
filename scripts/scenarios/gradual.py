"""Gradual pruning inside a Trainer: losses, reports, weights, checkpoints, and going on from one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from mfac_hf import MFAC, MFACPruningCallback, SparsitySchedule
from mfac_hf.callbacks import MFACLoggingCallback
from scenarios.common import EMPIRICAL, identity, report_of, sentences, tiny_bert, without_times

try:
    from mfac_hf.pruning.trainer.distillation import Distillation
except ImportError:  # where it was at first
    from mfac_hf.pruning.distillation import Distillation

__all__ = ["by_gradients_of_the_data", "by_gradients_of_the_window", "resume", "with_a_teacher"]

FAST: dict[str, Any] = {"num_grads": 8, "block_size": 16, "damping": 1e-4, "recomputations": 2, **EMPIRICAL}


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)


def _mfac(model: torch.nn.Module) -> torch.optim.Optimizer:
    return MFAC(model.parameters(), **identity(MFAC), lr=2e-3, num_grads=8, damping=1e-3, momentum=0.9, grad_decay=0.5)


def _trainer(folder: Path, optimizer: Any, **options: Any) -> Trainer:
    """A Trainer of 16 steps, 8 to an epoch."""
    model = tiny_bert(layers=1)
    settings = {
        "max_steps": 16,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "save_steps": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
    }
    return Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **{**settings, **options}),
        train_dataset=sentences(64),
        eval_dataset=sentences(16),
        optimizers=(optimizer(model), None),
    )


def _run(folder: Path, optimizer: Any, callback: MFACPruningCallback, resume: Path | None = None) -> dict[str, Any]:
    """Train, and return all that the run leaves behind."""
    trainer = _trainer(folder, optimizer, eval_on_start=callback.evaluate)
    MFACLoggingCallback.attach(trainer)
    callback.attach(trainer)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.evaluate()
    assert callback.masks is not None
    return {
        "log": without_times(trainer.state.log_history),
        "weights": trainer.model.state_dict(),
        "masks": dict(callback.masks.items()),
        "reports": [report_of(report) for report in callback.reports],
        # tensors and not bytes: safetensors writes several entries of metadata in any order
        "files": {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))},
        "progress": [without_times(json.loads(path.read_text())) for path in sorted(folder.rglob("pruning.json"))],
    }


def by_gradients_of_the_data(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """AdamW, a cubic schedule, the loss around each pruning, learning rates in cycles."""
    schedule = SparsitySchedule.cubic(final=0.8, start=2, end=12, every=4)
    return _run(folder, _adamw, MFACPruningCallback(schedule, evaluate=True, lr_cycle=0.3, **FAST))


def by_gradients_of_the_window(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """MFAC, whose window shrinks along and gives the gradients."""
    schedule = SparsitySchedule.from_list([0.5, 0.8], start=8, every=6, unit="step")
    return _run(folder, _mfac, MFACPruningCallback(schedule, gradients="optimizer", **FAST))


def with_a_teacher(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """A dense copy teaches the pruned model."""
    schedule = SparsitySchedule.geometric(final=0.7, start=0, end=1, unit="epoch")
    callback = MFACPruningCallback(schedule, distillation=Distillation(hardness=0.5, temperature=2.0), **FAST)
    return _run(folder, _adamw, callback)


def resume(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """Training goes on from a checkpoint of the older revision."""
    found = {}
    for name, optimizer in (("adamw", _adamw), ("mfac", _mfac)):
        schedule = SparsitySchedule.from_list([0.3, 0.6, 0.9], start=2, every=5, unit="step")
        checkpoint = exchange / f"{name}-checkpoint" / "checkpoint-8"
        if not checkpoint.exists():
            _run(folder / f"{name}-first", optimizer, MFACPruningCallback(schedule, **FAST))
            shutil.copytree(folder / f"{name}-first" / "checkpoint-8", checkpoint)
        (folder / name).mkdir()
        shutil.copytree(checkpoint, folder / name / "checkpoint-8")
        callback = MFACPruningCallback(schedule, **FAST)
        found[name] = _run(folder / name, optimizer, callback, folder / name / "checkpoint-8")
    return found
