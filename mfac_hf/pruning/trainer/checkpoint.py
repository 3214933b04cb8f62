"""State of a pruning run in Trainer's checkpoints: masks and a small JSON file, from which it resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mfac_hf.pruning.masks import MaskSet, shortened
from mfac_hf.pruning.schedule import SparsitySchedule

__all__ = ["PROGRESS_NAME", "Progress", "checkpoint_folder", "fingerprint", "read_checkpoint", "write_checkpoint"]

PROGRESS_NAME = "pruning.json"


@dataclass
class Progress:
    """How far a pruning run has come.

    Attributes:
        schedule: the fields of the schedule.
        target: the last sparsity of the schedule that was reached; 0 before the first.
        teacher: fingerprint of the teacher that was taken; None without one.
        reports: the report of each pruning so far, as a dictionary.
        weights: fingerprint of the weights under masks.
    """

    schedule: dict[str, Any]
    target: float
    teacher: str | None
    reports: list[dict[str, Any]]
    weights: str = ""


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the bytes of tensors, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder that Trainer saves in at this step."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def write_checkpoint(folder: Path, model: nn.Module, masks: MaskSet, progress: Progress) -> None:
    """Add masks and progress to a checkpoint; the progress comes last, so that where it is, nothing is missing."""
    masks.save(folder)
    progress = dataclasses.replace(progress, weights=fingerprint(masks.parameters(model).values()))
    half = folder / f"{PROGRESS_NAME}.tmp"
    half.write_text(json.dumps(dataclasses.asdict(progress), indent=1) + "\n")
    half.replace(folder / PROGRESS_NAME)


def read_checkpoint(
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    schedule: SparsitySchedule,
    targets: Collection[str],
    given: Path | None = None,
) -> tuple[Path, MaskSet, Progress]:
    """Find the checkpoint from which Trainer has just loaded the model, and read what :func:`write_checkpoint` added.

    Trainer does not tell callbacks where it loaded from. The folder is ``given``, or else the directory in
    ``args.resume_from_checkpoint``, or ``checkpoint-<step>`` in the output directory; the fingerprint of the weights
    shows whether it is the right one.

    Args:
        args: arguments of the training.
        state: state of the training.
        model: the model that Trainer has loaded.
        schedule: schedule of this run, which has to be that of the checkpoint.
        targets: names of the targets of this run, which have to be those of the checkpoint.
        given: the folder, if the user named it.

    Returns:
        The folder, the masks (on the devices of their parameters) and the progress.

    Raises:
        FileNotFoundError: there is no such folder, or it has no pruning state.
        ValueError: model, masks, schedule and targets do not belong together.
    """
    named = args.resume_from_checkpoint
    folder = given or (Path(named) if named and Path(named).is_dir() else checkpoint_folder(args, state))
    if not (folder / PROGRESS_NAME).is_file():
        raise FileNotFoundError(
            f"training resumes at step {state.global_step}, but there is no {folder / PROGRESS_NAME}. If the "
            "checkpoint lies elsewhere, name it: MFACPruningCallback(..., resume_from=DIRECTORY). If it was cut off "
            "while being saved, resume from the one before. If it comes from a run without this callback, start a new "
            "run from its model: pruning begins with the zeros that it has"
        )
    progress = Progress(**json.loads((folder / PROGRESS_NAME).read_text()))
    saved = SparsitySchedule(tuple(map(tuple, progress.schedule["points"])), progress.schedule["unit"])
    if saved != schedule:
        raise ValueError(
            f"the run in {folder} follows the schedule {saved.points} by {saved.unit}, this one {schedule.points} by "
            f"{schedule.unit}; resume with the same, or start a new run from the checkpoint's model"
        )
    masks = MaskSet.load(folder)
    if masks.keys() != set(targets):
        raise ValueError(
            f"the run in {folder} prunes {shortened(masks)}, and the targets of this one are {shortened(targets)}; "
            "resume with the same targets"
        )
    parameters = masks.parameters(model)
    masks = MaskSet({name: keep.to(parameters[name].device) for name, keep in masks.items()})
    nonzeros = masks.nonzeros(model)
    if nonzeros or fingerprint(parameters.values()) != progress.weights:
        nonzero = f" (weights that should be pruned are not zero in {shortened(nonzeros)})" if nonzeros else ""
        raise ValueError(
            f"the model that Trainer resumes with is not the one in {folder}{nonzero}; name the checkpoint that it "
            "was loaded from: MFACPruningCallback(..., resume_from=DIRECTORY)"
        )
    return folder, masks, progress
