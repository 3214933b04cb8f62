"""Gradients for the Fisher of a model, of examples drawn from a data set."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from mfac_hf.pruning.agreement import failing_together
from mfac_hf.pruning.batch_norm import averaging_anew
from mfac_hf.pruning.gradient_source import Consumer, hand_over
from mfac_hf.pruning.losses import BatchLoss, LossFunction, check_counts, is_unlabelled, model_loss, to_device
from mfac_hf.pruning.mean_gradient import mean_gradient
from mfac_hf.pruning.options import Fisher, PruningOptions, check_fisher
from mfac_hf.pruning.outputs import OutputsFunction, Scaling
from mfac_hf.pruning.passes import (
    PassQueue,
    Verdicts,
    device_of,
    example_bytes,
    longest_first,
    memory_budget,
    statistics,
    unlike_examples,
)
from mfac_hf.pruning.per_sample import batch_gradients
from mfac_hf.pruning.undisturbed import undisturbed

__all__ = ["DataLoaderGradients"]

logger = logging.getLogger(__name__)

# Gradients of single passes that wait to be handed over together, and their entries.
_ROWS, _BUFFER = 32, 1 << 26
# Relative error that rounding in another batch size explains; a loss that is no mean over examples is far above it.
_SAME = 1e-3
# Examples of a pass through batch norms in training mode: statistics of small batches differ from those of all.
_NORM_BATCH = 128


class DataLoaderGradients:
    """Gradients of the loss on examples of a data loader's data set.

    Of the given loader only ``dataset`` and ``collate_fn`` are used; a loader of this object's own draws the examples.
    Gradients are taken in evaluation mode. Afterwards the model's mode, the states of all random generators and the
    parameters' ``.grad`` and ``requires_grad`` are as before, so that training goes on unchanged.

    An example whose labels are all ignored, as a sentence without a masked token, has the gradient zero.

    Args:
        dataloader: a ``torch.utils.data.DataLoader`` (or Trainer's) over a data set with a length.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the examples of a collated batch; default
            ``model(**batch).loss``.
        fisher: ``"scaled"`` divides each example's gradient by the norm of its loss's gradient by the model's outputs
            (`mfac_hf.pruning.outputs`), ``"empirical"`` leaves it as it is.
        fisher_floor: least number to divide by.
        outputs_fn: finds the outputs in what the model returned (`mfac_hf.pruning.outputs.Scaling`).
        batch_size: examples that each gradient is the mean of.
        loss_samples: examples held out for :meth:`loss`; they give no gradients.
        examples_per_pass: examples that one pass through the model serves at most.
        memory_budget: bytes for a pass; one that would take more gets fewer examples, but always one. None: a quarter
            of what is free on the model's device.
        seed: seed of the choice of the held-out examples.
        process_group: ranks that share the work; each takes a part of the gradients, of examples of its own.

    Raises:
        TypeError: ``dataloader`` is no data loader.
        ValueError: a data set without a length, or too small to hold examples out.
    """

    def __init__(
        self,
        dataloader: DataLoader[Any],
        *,
        loss_fn: LossFunction | None = None,
        fisher: Fisher = PruningOptions.fisher,
        fisher_floor: float = PruningOptions.fisher_floor,
        outputs_fn: OutputsFunction | None = None,
        batch_size: int = 1,
        loss_samples: int = 0,
        examples_per_pass: int = PruningOptions.examples_per_pass,
        memory_budget: int | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not hasattr(dataloader, "dataset") or not hasattr(dataloader, "collate_fn"):
            raise TypeError(
                f"dataloader is a {type(dataloader).__name__}; expected a torch.utils.data.DataLoader, whose data set "
                "and collate function are used: DataLoader(examples, collate_fn=...)"
            )
        dataset: Any = dataloader.dataset
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"a data set of type {type(dataset).__name__} has no length, and examples cannot be drawn from it; "
                "read as many examples as are needed into a list or a datasets.Dataset"
            )
        if loss_samples >= len(dataset):
            raise ValueError(f"{loss_samples} of {len(dataset)} examples to be held out for the loss leave none")
        self.dataset, self.collate_fn = dataset, dataloader.collate_fn
        check_fisher(fisher, fisher_floor)
        self.loss_fn = loss_fn or model_loss
        self.fisher, self.fisher_floor = fisher, fisher_floor
        self._scaling = Scaling(fisher_floor, outputs_fn) if fisher == "scaled" else None
        self.batch_size, self.examples_per_pass, self.memory_budget = batch_size, examples_per_pass, memory_budget
        self.process_group = process_group
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        self.held_out, self.pool = order[:loss_samples], sorted(order[loss_samples:])
        self._verdicts: dict[tuple[str, ...], Verdicts] = {}
        self._example_bytes: int | None = None

    @classmethod
    def of_options(
        cls,
        dataloader: DataLoader[Any],
        options: PruningOptions,
        loss_fn: LossFunction | None = None,
        process_group: dist.ProcessGroup | None = None,
        outputs_fn: OutputsFunction | None = None,
    ) -> DataLoaderGradients:
        """Make the source that the options of a pruning ask for; arguments and errors are those of the class."""
        return cls(
            dataloader,
            loss_fn=loss_fn,
            fisher=options.fisher if options.method == "mfac" else "empirical",
            fisher_floor=options.fisher_floor,
            outputs_fn=outputs_fn,
            batch_size=options.grad_batch_size,
            loss_samples=options.loss_samples,
            examples_per_pass=options.examples_per_pass,
            memory_budget=options.memory_budget,
            seed=options.seed,
            process_group=process_group,
        )

    def check(self, num_grads: int, batch_norm_samples: int = 0) -> None:
        """Raise ValueError unless the data set has examples for ``num_grads`` gradients, and for averages."""
        if batch_norm_samples > len(self.pool):
            raise ValueError(f"batch_norm_samples is {batch_norm_samples}, and there are {len(self.pool)} examples")
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

        One backward pass serves many examples where it gives each its own gradient (`mfac_hf.pruning.passes`); a log
        line says where it does not.

        Args:
            model: the model.
            parameters: some of its parameters, by name.
            num_grads: gradients to take, each of a batch of its own; ranks that share the work take so many together.
            seed: seed of the choice of examples, and of whatever collating draws.
            consume: function that takes the gradients; none is kept here.

        Raises:
            ValueError: too few examples, a model that returns no loss, or a loss or gradient that is not finite.
            RuntimeError: another rank failed, or has ended.
        """
        with failing_together(self.process_group, "taking gradients to prune by"):
            self.check(num_grads)
            indices = self._draw(num_grads, seed)
            at_once = self.at_once(model, parameters) if self.batch_size == 1 else 1
            room = max(1, min(_ROWS, _BUFFER // sum(p.numel() for p in parameters.values())))
            waiting: list[list[Tensor]] = []
            unlabelled = steep = 0
            with undisturbed(model, parameters, seed):
                examples = longest_first(self.dataset, indices) if self.batch_size == 1 else indices
                queue = PassQueue(examples, at_once if at_once > 1 else self.batch_size, shared=at_once > 1)
                for batch in self.batches(model, queue):
                    if queue.shared and not self._agrees(model, parameters, batch, queue.examples, seed):
                        queue.cut()
                        continue
                    loss = self.loss_of(model, batch, parameters, count := len(queue.examples))
                    if queue.shared:
                        hand_over(parameters, waiting, consume)
                        for name, rows in batch_gradients(model, parameters, loss, count, loss.gradients):
                            consume(name, loss.checked(name, rows))
                    else:
                        waiting.append(loss.by_parameter())
                        if len(waiting) == room:
                            hand_over(parameters, waiting, consume)
                    unlabelled += count * loss.missing
                    steep += int(loss.norms.count_nonzero())
                hand_over(parameters, waiting, consume)
        counts = torch.tensor([len(indices), unlabelled, steep], device=device_of(model))
        if self.process_group is not None:
            dist.all_reduce(counts, group=self.process_group)
        check_counts(*counts.tolist())

    def mean(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], num_grads: int, seed: int
    ) -> dict[str, Tensor]:
        """Return the gradient of the mean loss, as it is, over the examples of :meth:`collect`: flat, by name."""
        self.check(num_grads)
        return mean_gradient(self, model, parameters, self._draw(num_grads, seed), seed)

    def average_batch_norms(self, model: nn.Module, count: int, seed: int) -> None:
        """Replace the statistics of batch norms by averages over ``count`` examples."""
        queue = PassQueue(self._drawn(count, seed), min(count, _NORM_BATCH))
        with undisturbed(model, {}, seed), torch.no_grad(), averaging_anew(model):
            for batch in self.batches(model, queue):
                self.loss_fn(model, batch)

    def try_batch(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the gradient of one batch, so that what cannot work fails before hours of training.

        Raises:
            ValueError: a model that returns no loss, or a loss or gradient that is not finite.
        """
        with undisturbed(model, parameters, seed=0):
            for batch in self.batches(model, PassQueue(self.pool[: self.batch_size], self.batch_size)):
                self.loss_of(model, batch, parameters, self.batch_size).by_parameter()

    def loss(self, model: nn.Module) -> float | None:
        """Return the mean loss on the held-out examples, in evaluation mode; None where there are none.

        A model that lost too much may have an infinite loss, or NaN. Batches without a label do not count.
        """
        if not self.held_out:
            return None
        total, counted = 0.0, 0
        queue = PassQueue(self.held_out, self.at_once(model, {}))
        with undisturbed(model, {}, seed=0), torch.no_grad():
            for batch in self.batches(model, queue):
                loss, count = float(self.loss_fn(model, batch)), len(queue.examples)
                if not (math.isnan(loss) and is_unlabelled(batch)):
                    total, counted = total + count * loss, counted + count
        return total / counted if counted else math.nan

    def _drawn(self, count: int, seed: int) -> list[int]:
        """Return examples at random, the same on all ranks."""
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed))
        return [self.pool[i] for i in order[:count].tolist()]

    def _draw(self, num_grads: int, seed: int) -> list[int]:
        """Return the examples of the gradients that this rank takes."""
        indices = self._drawn(num_grads * self.batch_size, seed)
        if self.process_group is None:
            return indices
        rank, ranks = self.process_group.rank(), self.process_group.size()
        first, last = num_grads * rank // ranks, num_grads * (rank + 1) // ranks
        return indices[first * self.batch_size : last * self.batch_size]

    def _agrees(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batch: Any,
        examples: Sequence[int],
        seed: int,
    ) -> bool:
        """Return whether one pass for a batch gives its examples what a pass for each gives them."""
        verdicts = self._verdicts.setdefault(tuple(parameters), Verdicts())
        values = statistics(batch, len(examples))
        ranges = verdicts.ranges(values)
        if (known := verdicts.known(ranges)) is not None:
            return known
        at, single, norms = unlike_examples(values, len(examples)), [], []
        error = norm = 0.0
        with undisturbed(model, parameters, seed):
            for alone in self.batches(model, PassQueue([examples[i] for i in at], 1)):
                own = self.loss_of(model, alone, parameters, 1)
                single.append(own.by_parameter())
                norms.append(own.norms)
            expected = {name: torch.stack(rows) for name, *rows in zip(parameters, *single, strict=True)}
            loss = self.loss_of(model, batch, parameters, len(examples))
            try:
                for name, rows in batch_gradients(model, parameters, loss, len(examples), loss.gradients):
                    error += float((rows[at] - expected[name]).square().sum())
                    norm += float(expected[name].square().sum())
            except NotImplementedError as reason:
                logger.info("a backward pass for each example: %s", reason)
                verdicts.stop()
                return False
        right = error <= _SAME**2 * norm
        # Where the norms agree, the floor has the same say.
        right &= torch.allclose(loss.norms[at], torch.cat(norms), rtol=_SAME, atol=_SAME * self.fisher_floor)
        if not right:
            off = (error / norm) ** 0.5 if norm else float("inf")
            logger.info("a backward pass for each example: one for %d gives others (error %.1e)", len(examples), off)
        if len(examples) > 1:  # one alone tells nothing of several
            verdicts.add(ranges, right)
        return right

    def at_once(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> int:
        """Return how many examples a pass may serve."""
        if self.examples_per_pass == 1:
            return 1
        if self._example_bytes is None:
            everything = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
            with undisturbed(model, everything, seed=0):
                [batch] = self.batches(model, PassQueue(self.pool[:1], 1))
                self._example_bytes = example_bytes(model, lambda: self.loss_fn(model, batch))
        rows = 8 * max((parameter.numel() for parameter in parameters.values()), default=0)
        budget = memory_budget(self.memory_budget, device_of(model), share=0.25)
        found = max(1, min(self.examples_per_pass, budget // max(1, self._example_bytes + rows)))
        if found < self.examples_per_pass:
            logger.info("passes for %d examples, as %d bytes allow", found, budget)
        return found

    def loss_of(self, model: nn.Module, batch: Any, parameters: Mapping[str, nn.Parameter], count: int) -> BatchLoss:
        """Return the loss of a batch of so many examples, and its gradients as this source scales them."""
        return BatchLoss(self.loss_fn, model, batch, count, parameters, self._scaling)

    def batches(self, model: nn.Module, queue: PassQueue) -> Iterator[Any]:
        """Yield the batch of each pass, on the model's device."""
        device = device_of(model)
        # Without workers, the loader asks for the examples of a pass when it is to begin, and not before.
        loader: DataLoader[Any] = DataLoader(self.dataset, batch_sampler=queue, collate_fn=self.collate_fn)
        for batch in loader:
            yield to_device(batch, device)
