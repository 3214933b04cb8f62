"""State of a pruning run: masks and a small JSON file, from which it resumes.

Each checkpoint gets both when Trainer calls ``on_save``. By then Trainer has written the model and, with
``save_total_limit``, has deleted older checkpoints: a run that is killed in between leaves a checkpoint without them.
So the masks in force lie in ``_pruning`` beside the checkpoints too, from the start of the training and after each
pruning until the training ends. They change only there, so they are those of any later checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mfac_hf.pruning.agreement import failing_together
from mfac_hf.pruning.masks import MaskSet, shortened
from mfac_hf.pruning.options import Fisher, PruningReport
from mfac_hf.pruning.schedule import SparsitySchedule
from mfac_hf.pruning.trainer.support import all_ranks
from mfac_hf.schema import check_schema
from mfac_hf.sparse.directory import restore_weights
from mfac_hf.storage import read_json, write_json

__all__ = [
    "PROGRESS_NAME",
    "Progress",
    "checkpoint_folder",
    "fingerprint",
    "forget_state",
    "read_checkpoint",
    "write_checkpoint",
    "write_state",
]

logger = logging.getLogger(__name__)

PROGRESS_NAME = "pruning.json"
# Trainer leaves folders that begin with an underscore out when it pushes the output directory.
_STATE_FOLDER = "_pruning"


@dataclass
class Progress:
    """How far a pruning run has come.

    Attributes:
        schedule: the fields of the schedule.
        target: the last sparsity of the schedule that was reached; 0 before the first.
        teacher: fingerprint of the teacher that was taken; None without one.
        reports: the report of each pruning so far, as a dictionary.
        weights: fingerprint of the weights under masks; empty beside the checkpoints, where no weights are.
        step: the step of the last pruning, at whose beginning the masks changed; 0 before the first.
    """

    schedule: dict[str, Any]
    target: float
    teacher: str | None
    reports: list[dict[str, Any]]
    weights: str = ""
    step: int = 0

    @classmethod
    def read(cls, file: Path) -> Progress:
        """Read what :func:`write_state` wrote.

        Raises:
            ValueError: the file is damaged, or none of its kind.
        """
        content = read_json(file)
        check_schema(content, _ProgressFile, str(file))
        names = [field.name for field in dataclasses.fields(cls) if field.name in content]
        progress = cls(**{name: content[name] for name in names})
        try:
            progress.sparsities()
            for report in progress.reports:
                PruningReport(**report)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{file} is damaged, or no record of a pruning run: {error}") from error
        return progress

    def sparsities(self) -> SparsitySchedule:
        """Return the schedule."""
        points: Any = tuple(map(tuple, self.schedule["points"]))
        return SparsitySchedule(points, self.schedule["unit"])

    def fisher(self) -> str | None:
        """Return the Fisher of the last pruning; None where there was none, or it took no gradients."""
        options = self.reports[-1].get("options") if self.reports else None
        if not isinstance(options, dict) or options.get("method") != "mfac":
            return None
        return options.get("fisher", "empirical")  # reports without it are older than the scaled one


class _ScheduleFields(TypedDict):
    points: list[list[float]]
    unit: Literal["step", "epoch"]


class _LaterFields(TypedDict, total=False):
    weights: str
    step: int


class _ProgressFile(_LaterFields):
    schedule: _ScheduleFields
    target: float
    teacher: str | None
    reports: list[dict[str, Any]]


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
    """Add masks and progress to a checkpoint.

    Raises:
        OSError: a file cannot be written.
    """
    _write(folder, masks, dataclasses.replace(progress, weights=fingerprint(masks.parameters(model).values())))


def write_state(args: TrainingArguments, masks: MaskSet, progress: Progress) -> None:
    """Write the masks in force beside the checkpoints, unless this run or this rank saves nothing.

    Raises:
        OSError: a file cannot be written.
    """
    if args.save_strategy == "no":
        return
    with failing_together(all_ranks(args), "writing the state of the pruning"):
        if args.should_save:
            folder = Path(str(args.output_dir)) / _STATE_FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder, masks, progress)


def forget_state(args: TrainingArguments) -> None:
    """Remove what :func:`write_state` wrote: every checkpoint has its own."""
    if args.should_save:
        shutil.rmtree(Path(str(args.output_dir)) / _STATE_FOLDER, ignore_errors=True)


def _write(folder: Path, masks: MaskSet, progress: Progress) -> None:
    masks.save(folder)
    write_json(folder / PROGRESS_NAME, dataclasses.asdict(progress))  # last: where it is, nothing is missing


def read_checkpoint(
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    schedule: SparsitySchedule,
    targets: Collection[str],
    given: Path | None = None,
    fisher: Fisher | None = None,
) -> tuple[Path, MaskSet, Progress]:
    """Find the checkpoint from which Trainer has just loaded the model, and read what :func:`write_checkpoint` added.

    Trainer does not tell callbacks where it loaded from. The folder is ``given``, or else the directory in
    ``args.resume_from_checkpoint``, or ``checkpoint-<step>`` in the output directory; the fingerprint of the weights
    shows whether it is the right one. Weights that have other names on disk are loaded here, as Trainer leaves them
    out (`mfac_hf.sparse.directory.restore_weights`). A checkpoint whose ``on_save`` was cut off has the state beside
    it, and gets it now.

    Args:
        args: arguments of the training.
        state: state of the training.
        model: the model that Trainer has loaded.
        schedule: schedule of this run, which has to be that of the checkpoint.
        targets: names of the targets of this run, which have to be those of the checkpoint.
        given: the folder, if the user named it.
        fisher: that of the prunings to come; a warning says so where the last one had another.

    Returns:
        The folder, the masks (on the devices of their parameters) and the progress.

    Raises:
        FileNotFoundError: there is no such folder, or it has no pruning state.
        ValueError: model, masks, schedule and targets do not belong together.
    """
    named = args.resume_from_checkpoint
    folder = given or (Path(named) if named and Path(named).is_dir() else checkpoint_folder(args, state))
    source = _state_of(folder, state.global_step)
    restore_weights(model, folder)
    progress = Progress.read(source / PROGRESS_NAME)
    saved = progress.sparsities()
    if saved != schedule:
        raise ValueError(
            f"the run in {folder} follows the schedule {saved.points} by {saved.unit}, this one {schedule.points} by "
            f"{schedule.unit}; resume with the same, or start a new run from the checkpoint's model"
        )
    if fisher is not None and (before := progress.fisher()) not in (None, fisher):
        logger.warning("prunings in %s were by the %s Fisher, and go on by the %s one", folder, before, fisher)
    masks = MaskSet.load(source)
    if masks.keys() != set(targets):
        raise ValueError(
            f"the run in {folder} prunes {shortened(masks)}, and the targets of this one are {shortened(targets)}; "
            "resume with the same targets"
        )
    parameters = masks.parameters(model)
    masks = MaskSet({name: keep.to(parameters[name].device) for name, keep in masks.items()})
    nonzeros = masks.nonzeros(model)
    if nonzeros or (source == folder and fingerprint(parameters.values()) != progress.weights):
        nonzero = f" (weights that should be pruned are not zero in {shortened(nonzeros)})" if nonzeros else ""
        raise ValueError(
            f"the model that Trainer resumes with is not the one in {folder}{nonzero}; name the checkpoint that it "
            "was loaded from: MFACPruningCallback(..., resume_from=DIRECTORY)"
        )
    if source != folder and args.should_save:  # the state beside it will be that of later prunings
        write_checkpoint(folder, model, masks, progress)
    return folder, masks, progress


def _state_of(folder: Path, step: int) -> Path:
    """Return where the state of a checkpoint lies: in its folder, or beside it if the run was killed while saving."""
    if (folder / PROGRESS_NAME).is_file():
        return folder
    beside = folder.parent / _STATE_FOLDER
    # Masks that changed at this step or later are not those of the checkpoint.
    if folder.is_dir() and (beside / PROGRESS_NAME).is_file() and Progress.read(beside / PROGRESS_NAME).step < step:
        logger.warning("%s was cut off while being saved; its masks are taken from %s", folder, beside)
        return beside
    raise FileNotFoundError(
        f"training resumes at step {step}, but there is no {folder / PROGRESS_NAME}. If the checkpoint lies "
        "elsewhere, name it: MFACPruningCallback(..., resume_from=DIRECTORY). If it was cut off while being saved, "
        "resume from the one before. If it comes from a run without this callback, start a new run from its model: "
        "pruning begins with the zeros that it has"
    )
