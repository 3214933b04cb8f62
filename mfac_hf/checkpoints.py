"""Checkpoints of a Trainer that a killed run, a full disk or a power cut leaves usable.

Trainer writes a checkpoint in place, file by file, and the first rank may delete older ones before the others have
written their part of the new one. A run that ends in the middle leaves a folder that looks like the last checkpoint
and is none: `last_whole_checkpoint` passes it over, and `WholeCheckpoints` deletes no older one before all ranks have
written the new one and all of it is on the disk.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from mfac_hf.storage import read_json, sync_tree, write_json

__all__ = ["WholeCheckpoints", "last_whole_checkpoint"]

logger = logging.getLogger(__name__)

# Names and sizes of the files of a checkpoint, written when all of them are on the disk.
LIST_NAME = "whole.json"
_STATE_NAME = "trainer_state.json"  # what Trainer writes last
_NAME = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
_RNG = re.compile(r"^rng_state_(\d+)\.pth$")


def last_whole_checkpoint(output_dir: str | os.PathLike[str], *, ranks: int = 1) -> str | None:
    """Return the newest checkpoint in a directory that was written to its end; a warning names what it passes over.

    ``trainer.train(resume_from_checkpoint=last_whole_checkpoint(directory))`` goes on after a kill, where
    ``resume_from_checkpoint=True`` would take the folder with the highest number.

    Args:
        output_dir: directory of the training.
        ranks: processes that go on. A checkpoint that was not seen whole needs the random state of each.

    Returns:
        The path; None where there is none.
    """
    folder = Path(output_dir)
    for checkpoint in reversed(_checkpoints(folder) if folder.is_dir() else []):
        reason = _what_is_missing(checkpoint, ranks)
        if reason is None:
            return str(checkpoint)
        logger.warning("%s was cut off while being saved (%s); the one before it is taken", checkpoint, reason)
    return None


class WholeCheckpoints(TrainerCallback):
    """Let Trainer's checkpoints be whole before older ones go.

    ``WholeCheckpoints.attach(trainer)`` is all that a script needs. After Trainer and all callbacks have written a
    checkpoint, and all ranks have come here, its files are synced to the disk and listed in ``whole.json``; only then
    the older ones are deleted that ``save_total_limit`` has no room for. Trainer itself deletes none meanwhile: the
    limit is taken from its arguments while it trains.

    A run that was killed after its last step, before it ended, would take one step more when it goes on: so Trainer
    does with ``max_steps``. That step finds no gradients here, and changes no weight.

    Attributes:
        limit: ``save_total_limit``; None keeps all.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self._was_over = False

    @classmethod
    def attach(cls, trainer: Trainer) -> WholeCheckpoints:
        """Add this callback to a trainer, after those that write into its checkpoints."""
        callback = cls()
        trainer.add_callback(callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the limit over; see whether there is anything left to train."""
        self._was_over = 0 < state.max_steps <= state.global_step
        if args.save_total_limit is not None:  # it still is None where an error ended an earlier training
            self.limit, args.save_total_limit = args.save_total_limit, None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the gradients of a step too many away."""
        if self._was_over:
            kwargs["optimizer"].zero_grad(set_to_none=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where a save overwrites a checkpoint, let that one be none from now on."""
        may_save = control.should_save or (control.should_evaluate and args.save_strategy == SaveStrategy.BEST)
        if args.should_save and may_save:
            for name in (LIST_NAME, _STATE_NAME):
                (self._folder(args, state) / name).unlink(missing_ok=True)

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sync and list the checkpoint, then delete older ones.

        Raises:
            OSError: the disk did not take it; no older one is deleted then.
        """
        folder = self._folder(args, state)
        if args.world_size > 1:
            dist.barrier()
        if not args.should_save or not folder.is_dir():
            return
        sync_tree(folder)
        write_json(folder / LIST_NAME, {name: size for name, size in _files(folder).items() if name != LIST_NAME})
        if self.limit is not None and self.limit > 0:
            kept = {folder.name} | ({Path(best).name} if (best := state.best_model_checkpoint) else set())
            others = [older for older in _checkpoints(folder.parent) if older.name not in kept]
            for older in others[: max(0, len(others) + len(kept) - max(self.limit, len(kept)))]:
                shutil.rmtree(older, ignore_errors=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the limit back."""
        if self.limit is not None:
            args.save_total_limit = self.limit

    @staticmethod
    def _folder(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a directory, by step."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.match(path.name)) and path.is_dir()}
    return [found[step] for step in sorted(found)]


def _files(folder: Path) -> dict[str, int]:
    """Size of each file below a folder, by its path from there."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _what_is_missing(folder: Path, ranks: int) -> str | None:
    """Say in words why a checkpoint is not whole; None where it is."""
    files = _files(folder)
    if LIST_NAME in files:
        listed = read_json(folder / LIST_NAME)
        wrong = [name for name, size in listed.items() if files.get(name) != size]
        return f"{wrong[0]} is not as it was written" if wrong else None
    # Of a run without `WholeCheckpoints`, or that was killed before the list.
    if _STATE_NAME not in files:
        return f"it has no {_STATE_NAME}"
    saved = {int(match[1]) for name in files if (match := _RNG.match(name))}
    if saved and not saved >= set(range(ranks)):
        return f"it has the random state of {len(saved)} ranks, and {ranks} go on"
    for name in files:
        try:
            _read(folder / name)
        except Exception as error:  # which one is left to chance where bytes are
            return f"{name} is damaged: {error or type(error).__name__}"
    return None


def _read(file: Path) -> None:
    """Raise whatever it is if a file of a known kind is cut off."""
    if file.suffix == ".json":
        read_json(file)
    elif file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt"):  # compares the header with the length of the file
            pass
    elif file.suffix in (".pt", ".pth", ".bin"):
        with zipfile.ZipFile(file) as archive:  # its list of parts stands at the end
            if (name := archive.testzip()) is not None:
                raise ValueError(f"the checksum of its part {name} does not fit")
