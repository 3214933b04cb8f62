"""Gradients for the Fisher of a model, of examples drawn from a data set."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from mfac_hf.pruning.per_sample import batch_gradients

__all__ = ["DataLoaderGradients", "GradientSet", "GradientSource"]

logger = logging.getLogger(__name__)

LossFunction = Callable[[nn.Module, Any], Tensor]
Consumer = Callable[[str, Tensor], None]

# Examples in a forward pass that serves several gradients; more hardly help on a CPU.
_CHUNK = 32
# Entries of gradients that wait to be handed over together.
_BUFFER = 1 << 26
# Relative error that rounding in another batch size explains; a loss that is no mean over examples is far above it.
_SAME = 1e-3


class GradientSource(Protocol):
    """Where the gradients of a pruning step come from.

    Attributes:
        process_group: ranks that take a share of the gradients each; None if every rank takes them all.
    """

    process_group: dist.ProcessGroup | None

    def check(self, num_grads: int) -> None:
        """Raise ValueError unless ``num_grads`` gradients can be drawn."""

    def collect(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], num_grads: int, seed: int, consume: Consumer
    ) -> None:
        """Hand ``num_grads`` gradients of each parameter to ``consume(name, rows)``, rows being n x numel, float32.

        The same seed gives the gradients of the same examples, for whichever parameters.
        """

    def loss(self, model: nn.Module) -> float | None:
        """Return the loss on held-out examples; None where there are none."""


@dataclass(frozen=True)
class GradientSet:
    """The gradients of one sub-step. They are not kept: each time they are collected, the same ones are drawn again.

    Attributes:
        source: source that draws them.
        model: the model whose gradients they are.
        num_grads: number of gradients; ranks that take a share each have so many together.
        seed: seed of the draw.
        advance: function that is called with the number of gradients that were taken, for a progress bar.
    """

    source: GradientSource
    model: nn.Module
    num_grads: int
    seed: int
    advance: Callable[[int], object] | None = None

    def collect(self, parameters: Mapping[str, nn.Parameter], consume: Consumer) -> None:
        """Hand the gradients of some parameters to ``consume(name, rows)``, rows being n x numel, float32.

        Raises:
            ValueError: too few gradients, or a loss or gradient that is not finite.
        """
        last = next(reversed(list(parameters)))

        def consume_and_count(name: str, rows: Tensor) -> None:
            consume(name, rows)
            if name == last and self.advance is not None:
                self.advance(len(rows))

        self.source.collect(self.model, parameters, self.num_grads, self.seed, consume_and_count)


class DataLoaderGradients:
    """Gradients of the loss on examples of a data loader's data set.

    Of the given loader only ``dataset`` and ``collate_fn`` are used; a loader of this object's own draws the examples.
    Gradients are taken in evaluation mode. Afterwards the model's mode, the states of all random generators and the
    parameters' ``.grad`` and ``requires_grad`` are as before, so that training goes on unchanged.

    Args:
        dataloader: a ``torch.utils.data.DataLoader`` (or Trainer's) over a data set with a length.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the examples of a collated batch; default
            ``model(**batch).loss``.
        batch_size: examples that each gradient is the mean of.
        loss_samples: examples held out for :meth:`loss`; they give no gradients.
        seed: seed of the choice of the held-out examples.
        process_group: ranks that share the work; each takes a part of the gradients, of examples of its own.

    Raises:
        ValueError: a data set without a length, or too small to hold examples out.
    """

    def __init__(
        self,
        dataloader: DataLoader[Any],
        *,
        loss_fn: LossFunction | None = None,
        batch_size: int = 1,
        loss_samples: int = 0,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        dataset: Any = dataloader.dataset
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"a data set of type {type(dataset).__name__} has no length, and examples cannot be drawn from it; "
                "read as many examples as are needed into a list or a datasets.Dataset"
            )
        if loss_samples >= len(dataset):
            raise ValueError(f"{loss_samples} of {len(dataset)} examples to be held out for the loss leave none")
        self.dataset, self.collate_fn = dataset, dataloader.collate_fn
        self.loss_fn = loss_fn or model_loss
        self.batch_size = batch_size
        self.process_group = process_group
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        self.held_out, self.pool = order[:loss_samples], sorted(order[loss_samples:])
        self._separable: dict[tuple[str, ...], bool] = {}

    def check(self, num_grads: int) -> None:
        """Raise ValueError unless the data set has examples for ``num_grads`` gradients."""
        if (available := len(self.pool) // self.batch_size) < num_grads:
            raise ValueError(
                f"{num_grads} gradients of {self.batch_size} example(s) each were asked for, and {len(self.pool)} "
                f"examples give {available}; lower num_grads or grad_batch_size, or use more data"
            )
        if self.process_group is not None and num_grads < self.process_group.size():
            raise ValueError(
                f"{num_grads} gradients for {self.process_group.size()} ranks; each rank needs one: raise num_grads"
            )

    def collect(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], num_grads: int, seed: int, consume: Consumer
    ) -> None:
        """Hand ``num_grads`` gradients of each parameter to ``consume(name, rows)``, rows being n x numel, float32.

        One backward pass serves many examples (`mfac_hf.pruning.per_sample`) where it gives the first two of them the
        same gradients as a pass for each; a log line says where it does not.

        Args:
            model: the model.
            parameters: some of its parameters, by name.
            num_grads: gradients to take, each of a batch of its own; ranks that share the work take so many together.
            seed: seed of the choice of examples, and of whatever collating draws.
            consume: function that takes the gradients; none is kept here.

        Raises:
            ValueError: too few examples, a model that returns no loss, or a loss or gradient that is not finite.
        """
        self.check(num_grads)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(self.pool), generator=generator)[: num_grads * self.batch_size]
        indices = [self.pool[i] for i in drawn.tolist()]
        if self.process_group is not None:
            rank, ranks = self.process_group.rank(), self.process_group.size()
            first, last = num_grads * rank // ranks, num_grads * (rank + 1) // ranks
            indices = indices[first * self.batch_size : last * self.batch_size]
        key = tuple(parameters)
        if self.batch_size == 1 and key not in self._separable:
            with undisturbed(model, parameters, seed):
                self._separable[key] = self._compare(model, parameters, indices)
        with undisturbed(model, parameters, seed):
            if self._separable.get(key):
                for batch, count in self._batches(model, indices, _CHUNK):
                    for name, rows in batch_gradients(model, parameters, self._loss_of(model, batch), count):
                        consume(name, _finite(name, rows))
            else:
                self._one_by_one(model, parameters, indices, consume)

    def _one_by_one(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], indices: Sequence[int], consume: Consumer
    ) -> None:
        """Take each gradient by a backward pass of its own; several are handed over together."""
        room = max(1, min(_CHUNK, _BUFFER // sum(p.numel() for p in parameters.values())))
        waiting: list[list[Tensor]] = []
        for batch, _ in self._batches(model, indices, self.batch_size):
            waiting.append(_gradients(parameters, self._loss_of(model, batch)))
            if len(waiting) == room:
                _hand_over(parameters, waiting, consume)
        if waiting:
            _hand_over(parameters, waiting, consume)

    def loss(self, model: nn.Module) -> float | None:
        """Return the mean loss on the held-out examples, in evaluation mode; None where there are none.

        A model that lost too much may have an infinite loss, or NaN.
        """
        if not self.held_out:
            return None
        total = 0.0
        with undisturbed(model, {}, seed=0), torch.no_grad():
            for batch, count in self._batches(model, self.held_out, _CHUNK):
                total += count * float(self.loss_fn(model, batch))
        return total / len(self.held_out)

    def _loss_of(self, model: nn.Module, batch: Any) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            value = self.loss_fn(model, batch)
            if not torch.isfinite(value).all() or value.numel() != 1:
                raise ValueError(
                    f"the loss of a batch is {value.detach()}; expected one finite number. A model whose loss is "
                    "not finite cannot be pruned by its gradients: check its weights and the data"
                )
            return value

        return loss

    def _batches(self, model: nn.Module, indices: Sequence[int], batch_size: int) -> Iterator[tuple[Any, int]]:
        """Yield batches on the model's device, and their sizes."""
        device = next(model.parameters()).device
        loader: DataLoader[Any] = DataLoader(
            self.dataset, batch_size, sampler=list(indices), collate_fn=self.collate_fn
        )
        for number, batch in enumerate(loader):
            yield to_device(batch, device), min(batch_size, len(indices) - number * batch_size)

    def _compare(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], indices: Sequence[int]) -> bool:
        """Return whether one backward pass gives the first two examples what a pass for each gives them."""
        single = [
            _gradients(parameters, self._loss_of(model, batch)) for batch, _ in self._batches(model, indices[:2], 1)
        ]
        expected = {name: torch.stack(rows) for name, *rows in zip(parameters, *single, strict=True)}
        error = norm = 0.0
        try:
            for batch, count in self._batches(model, indices[:_CHUNK], _CHUNK):
                for name, rows in batch_gradients(model, parameters, self._loss_of(model, batch), count):
                    error += float((rows[:2] - expected[name]).square().sum())
                    norm += float(expected[name].square().sum())
        except NotImplementedError as reason:
            logger.info("a backward pass for each example: %s", reason)
            return False
        if error > _SAME**2 * norm:
            off = (error / norm) ** 0.5 if norm else float("inf")
            logger.info("a backward pass for each example: one for all gives others (relative error %.1e)", off)
            return False
        return True


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that the model itself computes for a batch; ValueError where it returns none."""
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returned no loss for a batch of {sorted(batch)}: labels are missing, or the loss "
            "is to be computed by loss_fn(model, batch)"
        )
    return loss


def _gradients(parameters: Mapping[str, nn.Parameter], loss: Callable[[], Tensor]) -> list[Tensor]:
    """Return the flat gradient of one loss for each parameter; zeros where the loss does not depend on it."""
    gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    return [
        torch.zeros(p.numel(), device=p.device) if gradient is None else gradient.flatten().float()
        for p, gradient in zip(parameters.values(), gradients, strict=True)
    ]


def _hand_over(parameters: Mapping[str, nn.Parameter], waiting: list[list[Tensor]], consume: Consumer) -> None:
    for name, *rows in zip(parameters, *waiting, strict=True):
        consume(name, _finite(name, torch.stack(rows)))
    waiting.clear()


def _finite(name: str, rows: Tensor) -> Tensor:
    if not torch.isfinite(rows.sum()):
        raise ValueError(f"a gradient of {name} is not finite, although the loss is; check the model's weights")
    return rows


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch on a device, with the tensors inside mappings, lists and tuples."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [to_device(value, device) for value in batch]
    return batch


@contextlib.contextmanager
def undisturbed(model: nn.Module, parameters: Mapping[str, nn.Parameter], seed: int) -> Iterator[None]:
    """Inside the block: evaluation mode, seeded generators, gradients of the parameters. After it all is as before."""
    modes = {module: module.training for module in model.modules()}
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.enable_grad():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            model.eval()
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, mode in modes.items():
            module.training = mode
        for parameter in frozen:
            parameter.requires_grad_(False)
