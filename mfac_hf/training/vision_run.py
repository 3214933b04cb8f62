"""A run on a vision model, as training and pruning share it: epochs, evaluation, batch norm, logs and states."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed, tqdm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from mfac_hf.pruning.batch_norm import averaging_anew, batch_norms
from mfac_hf.storage import load_tensors, save_tensors, write_json, write_text
from mfac_hf.tasks.vision import FolderImages, VisionData, whole_batch
from mfac_hf.tasks.vision_preprocess import AugmentedImages, Preprocess
from mfac_hf.training.curve import LossCurve

__all__ = ["RunLog", "VisionRun", "learning_rate_plan", "load_state", "logits_of"]

Batch = tuple[Tensor, Tensor]


class VisionRun:
    """A model, its data and an `Accelerator`: one code path for CPU, GPU and several processes.

    The seed and the epoch alone decide order and augmentation of the training images, so an epoch that is repeated
    after a kill is the same to the bit.

    Args:
        model: takes images (N, C, H, W), returns logits or an output with ``logits``.
        data: the data set.
        preprocess: normalisation and augmentation.
        batch_size: images in a batch, over all processes.
        seed: seed of everything random.
        mixed_precision: ``"bf16"`` or ``"no"``; None for what accelerate's configuration says.
        num_workers: processes that read images; None for none where images are in memory, else up to 8.
        augment: whether training images are augmented.
        progress: whether to show progress bars.
    """

    def __init__(
        self,
        model: nn.Module,
        data: VisionData,
        preprocess: Preprocess,
        *,
        batch_size: int = 128,
        seed: int = 0,
        mixed_precision: str | None = None,
        num_workers: int | None = None,
        augment: bool = True,
        progress: bool = True,
    ) -> None:
        if not 1 <= batch_size <= len(data.train):
            raise ValueError(f"batch size {batch_size}: expected 1 to {len(data.train)}, the training images")
        configuration = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=seed)
        self.accelerator = Accelerator(mixed_precision=mixed_precision, dataloader_config=configuration)
        set_seed(seed)
        self.data, self.preprocess, self.seed, self.augment, self.progress = data, preprocess, seed, augment, progress
        self._train_images = data.train
        while isinstance(self._train_images, Subset):
            self._train_images = self._train_images.dataset
        if num_workers is None:
            num_workers = min(8, os.cpu_count() or 1) if isinstance(self._train_images, FolderImages) else 0
        self._workers = num_workers
        self.model = self.accelerator.prepare(model)
        self.train_loader = self.loader(data.train, batch_size, shuffle=True)
        self.test_loader = self.loader(data.test, batch_size)

    @property
    def bare_model(self) -> nn.Module:
        """The model without what `accelerate` wraps around it."""
        bare: nn.Module = self.accelerator.unwrap_model(self.model)
        return bare

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """All processes, or None where there is one."""
        return dist.group.WORLD if self.accelerator.num_processes > 1 else None

    def loader(self, images: Any, batch_size: int, *, shuffle: bool = False) -> Any:
        """A prepared loader of whole batches."""
        loader: DataLoader[Any] = DataLoader(
            images, batch_size, shuffle=shuffle, collate_fn=whole_batch, num_workers=self._workers
        )
        return self.accelerator.prepare(loader)

    def generator(self, *salt: int) -> torch.Generator:
        """A generator for augmentation that depends on seed, process and ``salt`` alone."""
        mixed = np.random.SeedSequence((self.seed, self.accelerator.process_index, *salt)).generate_state(1)[0]
        return torch.Generator(self.accelerator.device).manual_seed(int(mixed))

    def logits(self, model: nn.Module, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """The model's logits (N, classes) of a raw batch."""
        return logits_of(model(self.preprocess(batch[0], generator)))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a raw batch."""
        return F.cross_entropy(self.logits(model, batch), batch[1])

    def gradient_loader(self) -> DataLoader[Any]:
        """Training images for a pruner; the loader is not prepared, since each process draws its own images."""
        images = AugmentedImages(self.data.train, self.preprocess, self.seed) if self.augment else self.data.train
        return DataLoader(images, collate_fn=whole_batch)

    def train_epoch(
        self,
        optimizer: Any,
        epoch: int,
        after_step: Callable[[], None] | None = None,
        curve: LossCurve | None = None,
        curve_every: int = 1,
        distil: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> dict[str, float]:
        """Train for one epoch.

        Args:
            optimizer: prepared by the accelerator.
            epoch: decides order and augmentation of the images.
            after_step: called after each step.
            curve: gets the losses of this process and the time of its steps, augmentation included.
            curve_every: steps between entries of the curve.
            distil: takes preprocessed images, logits and cross-entropy, and returns the loss to descend.

        Returns:
            Mean of the loss that was descended, and seconds.

        Raises:
            FloatingPointError: the loss of a step is not finite.
        """
        self.model.train()
        optimizer.train()  # as Trainer does: its processes step together
        self.train_loader.set_epoch(epoch)
        if isinstance(self._train_images, FolderImages):
            self._train_images.epoch = epoch
        generator = self.generator(1, epoch) if self.augment else None
        started, total, count = time.perf_counter(), 0.0, 0
        for batch in self._bar(self.train_loader, f"epoch {epoch}"):
            if curve is not None:
                curve.begin_step()
            optimizer.zero_grad()
            images = self.preprocess(batch[0], generator)
            logits = logits_of(self.model(images))
            loss = F.cross_entropy(logits, batch[1])
            if distil is not None:
                loss = distil(images, logits, loss)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss became {loss.item()} in epoch {epoch}: lower the learning rate or raise the damping"
                )
            self.accelerator.backward(loss)
            optimizer.step()
            if after_step is not None:
                after_step()
            if curve is not None:
                curve.end_step(self.accelerator.device)
                curve.add_step(loss.item(), curve_every)
            total, count = total + loss.item() * len(batch[1]), count + len(batch[1])
        sums = self.accelerator.reduce(torch.tensor([total, count], device=self.accelerator.device))
        return {"loss": (sums[0] / sums[1]).item(), "seconds": time.perf_counter() - started}

    def evaluate(self, loader: Any = None) -> float:
        """Share of the images of a prepared loader (the test images if None) that are classified correctly."""
        return self.accuracy_and_loss(loader)[0]

    @torch.no_grad()
    def accuracy_and_loss(self, loader: Any = None) -> tuple[float, float]:
        """Share of images that are classified correctly, and mean cross-entropy; see `evaluate`."""
        self.model.eval()
        right, total, loss = 0, 0, 0.0
        for batch in self._bar(self.test_loader if loader is None else loader, "evaluation"):
            logits = self.logits(self.model, batch)
            losses = F.cross_entropy(logits, batch[1], reduction="none")
            correct, losses = self.accelerator.gather_for_metrics((logits.argmax(1) == batch[1], losses))
            right, total, loss = right + int(correct.sum()), total + len(correct), loss + float(losses.double().sum())
        return right / total, loss / total

    @torch.no_grad()
    def reestimate_batch_norm(self, num_images: int, salt: int = 0) -> None:
        """Replace the statistics of every batch norm by the plain average over augmented training images.

        The weights were trained on augmented images: statistics of plain ones cost 2 to 4 points of accuracy.

        Args:
            num_images: images to average over, in all processes together, rounded up to whole batches.
            salt: each value draws other images.
        """
        self.train_loader.set_epoch(10_000 + salt)  # images that no epoch sees in this order
        generator, seen = self.generator(2, salt), 0
        self.model.eval()
        with averaging_anew(self.bare_model):
            for batch in self.train_loader:
                self.logits(self.bare_model, batch, generator if self.augment else None)
                seen += len(batch[1]) * self.accelerator.num_processes
                if seen >= num_images:
                    break
        for norm in batch_norms(self.bare_model):
            for buffer in (norm.running_mean, norm.running_var):
                if buffer is not None:
                    buffer.copy_(self.accelerator.reduce(buffer, reduction="mean"))

    @contextmanager
    def reestimated_batch_norm(self, num_images: int, salt: int = 0, *, keep: bool = False) -> Iterator[None]:
        """Re-estimate the batch norms for a block of code; afterwards the model has its own statistics again.

        Args:
            num_images: images to re-estimate with.
            salt: see `reestimate_batch_norm`.
            keep: whether the re-estimated statistics stay.
        """
        before = {name: value.clone() for name, value in self.bare_model.named_buffers()}
        self.reestimate_batch_norm(num_images, salt)
        try:
            yield
        finally:
            if not keep:
                for name, value in self.bare_model.named_buffers():
                    value.copy_(before[name])

    def accuracies(self, bn_images: int, *, keep: bool, salt: int = 0) -> dict[str, float]:
        """Test accuracy as the model is, and after re-estimating its batch norms.

        Args:
            bn_images: images to re-estimate with.
            keep: whether the re-estimated statistics stay.
            salt: see `reestimate_batch_norm`.
        """
        found = {"accuracy": self.evaluate()}
        with self.reestimated_batch_norm(bn_images, salt, keep=keep):
            found["accuracy_bn"] = self.evaluate()
        return found

    def save(self, path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
        """Write plain values and tensors on the main process (`mfac_hf.storage.save_tensors`).

        All processes call this: the state of an optimizer is gathered from all of them.
        """
        if self.accelerator.is_main_process:
            save_tensors(path, state)

    def _bar(self, batches: Any, description: str) -> Any:
        return tqdm(batches, desc=description, leave=False, disable=not self.progress)


def logits_of(output: Any) -> Tensor:
    """The logits (N, classes) of what a model returned: a tensor, or an output with ``logits``."""
    logits: Tensor = getattr(output, "logits", output)
    return logits


def learning_rate_plan(lr: float, num_epochs: int, drop_at: Sequence[int], drop_by: float) -> list[float]:
    """Learning rate of each epoch: ``lr``, multiplied by ``drop_by`` from each epoch in ``drop_at`` on.

    Raises:
        ValueError: drop epochs that do not rise, or that lie outside the run.
    """
    if list(drop_at) != sorted(set(drop_at)) or any(not 0 < epoch < num_epochs for epoch in drop_at):
        raise ValueError(
            f"--drop_at {' '.join(map(str, drop_at))} with {num_epochs} epochs: expected rising epochs from 1 to "
            f"{num_epochs - 1}"
        )
    return [lr * drop_by ** sum(epoch >= drop for drop in drop_at) for epoch in range(num_epochs)]


class RunLog:
    """Rows of results, as ``PREFIX.csv`` and, with what it takes to repeat the run, ``PREFIX.json``.

    Args:
        prefix: path without suffix; its directory is made when the first row comes.
        header: what the JSON file holds beside the rows.
        rows: rows of the part of the run that came before.
    """

    def __init__(self, prefix: str | os.PathLike[str], header: Mapping[str, Any], rows: Sequence[Any] = ()) -> None:
        self.prefix, self.header, self.rows = str(prefix), dict(header), [dict(row) for row in rows]

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row and write both files anew."""
        self.rows.append(dict(row))
        write_json(f"{self.prefix}.json", {**self.header, "rows": self.rows})
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, names)
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(f"{self.prefix}.csv", table.getvalue())


def load_state(path: str | os.PathLike[str], arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the state of a run that was cut off; None if there is none.

    Args:
        path: what `VisionRun.save` wrote; the state has the run's ``arguments``.
        arguments: those of the run that wants to continue.

    Raises:
        ValueError: the arguments differ; the message names the first that does. Or the file is damaged.
    """
    if not Path(path).is_file():
        return None
    state: dict[str, Any] = load_tensors(path)
    if not isinstance(state, dict) or not isinstance(state.get("arguments"), dict):
        raise ValueError(f"{path} is no state of a run: it has no arguments. Start anew without --resume")
    # What runs from before there was a choice do not name.
    older = {"metric": "identity", "fisher": "empirical", "fisher_floor": arguments.get("fisher_floor")}
    older |= {"first_order": False, "batch_norm_samples": 0, "mixed_precision": None}
    older |= {"distillation_hardness": 0.0, "distillation_temperature": arguments.get("distillation_temperature")}
    before = {**older, **state["arguments"]}
    differing = [key for key in arguments if before.get(key) != arguments[key]]
    if differing:
        key = differing[0]
        raise ValueError(
            f"--resume: the run in {path} was started with --{key} {before.get(key)}, not {arguments[key]}; continue "
            "with its flags, or start anew without --resume"
        )
    return state
