"""How many examples one backward pass serves: what memory allows, and what gives each its own gradient.

One pass for many examples (`mfac_hf.pruning.per_sample`) is right where the loss of a batch is the mean of the losses
that its examples have by themselves. Losses that are a mean over tokens are that only in batches whose examples have
equally many labels; padding changes some losses, weights of classes others. Nothing but a comparison tells, and it
holds for batches of its kind alone. So a batch is described by how far its examples lie apart, in numbers of ignored
labels and zeros (padding, attention masks) and in what stands once for each (labels, weights). It is compared with
passes for single examples, the most unlike ones among them, unless a batch whose examples lay as far apart was right,
or one whose examples lay closer together was wrong. What is alike in all examples of a batch tells nothing apart,
whatever it is. Texts come longest first, so that few are padded and the first comparisons tell of the later batches.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mfac_hf.machine import available_bytes
from mfac_hf.pruning.losses import IGNORED_LABEL

__all__ = [
    "PassQueue",
    "Ranges",
    "Verdicts",
    "device_of",
    "example_bytes",
    "longest_first",
    "memory_budget",
    "statistics",
    "unlike_examples",
]

# Wrong verdicts after which nothing more is compared: data that are drawn anew each time never agree.
_ENOUGH = 8

# What a batch spans: the least and the largest value of each statistic of its examples, None where they are alike.
Ranges = dict[str, tuple[float, float] | None]


def statistics(batch: Any, count: int) -> dict[str, Tensor]:
    """Return numbers that tell the examples of a batch apart, {what: (count,)}, float64 on the CPU."""
    found = {}
    for name, tensor in _tensors(batch):
        if tensor.ndim == 0 or len(tensor) != count or tensor.is_complex():
            continue
        if tensor.ndim == 1:
            found[name] = tensor
        elif not tensor.is_floating_point():
            rows = tensor.flatten(1)
            found[f"{name}: ignored"] = (rows == IGNORED_LABEL).sum(1)
            found[f"{name}: zeros"] = (rows == 0).sum(1)
    return {name: values.detach().double().cpu() for name, values in found.items()}


def kind_of(batch: Any) -> str:
    """Return the shapes of a batch of one example, and how many labels it ignores, as a key."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(batch)}
    ignored = {name: float(value) for name, value in statistics(batch, 1).items() if name.endswith(": ignored")}
    return f"{shapes} {ignored}"


def joined(batches: Sequence[Any]) -> Any:
    """Return one batch of the examples in batches of one kind (`kind_of`); what is no tensor is the first one's."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(list(batches)) if first.ndim else first
    if isinstance(first, Mapping):
        return {key: joined([batch[key] for batch in batches]) for key in first}
    if isinstance(first, list | tuple):
        return [joined(parts) for parts in zip(*batches, strict=True)]
    return first


def _tensors(batch: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _tensors(value, f"{name}.{key}")
    elif isinstance(batch, list | tuple):
        for key, value in enumerate(batch):
            yield from _tensors(value, f"{name}.{key}")


def unlike_examples(values: Mapping[str, Tensor], count: int) -> list[int]:
    """Return the positions of the first two examples, and of those at both ends of each statistic that varies."""
    ends = {int(end) for column in values.values() if column.min() < column.max() for end in _ends(column)}
    return sorted({*range(min(2, count)), *ends})


def _ends(column: Tensor) -> tuple[Tensor, Tensor]:
    return column.argmin(), column.argmax()


class Verdicts:
    """What comparisons have shown, of batches by what they span."""

    def __init__(self) -> None:
        self._right: list[Ranges] = []
        self._wrong: list[Ranges] = []

    def stop(self) -> None:
        """Compare nothing more: passes cannot be shared."""
        self._right, self._wrong = [], [{}] * _ENOUGH

    @staticmethod
    def ranges(values: Mapping[str, Tensor]) -> Ranges:
        """Return what a batch spans, from its `statistics`."""
        ends = {name: (float(column.min()), float(column.max())) for name, column in values.items()}
        return {name: (low, high) if low < high else None for name, (low, high) in ends.items()}

    def known(self, ranges: Ranges) -> bool | None:
        """Return whether one pass serves such a batch; None where only a comparison tells."""
        if any(_inside(ranges, other) for other in self._right):
            return True
        if len(self._wrong) == _ENOUGH or any(_inside(other, ranges) for other in self._wrong):
            return False
        return None

    def add(self, ranges: Ranges, right: bool) -> None:
        """Note the result of a comparison."""
        (self._right if right else self._wrong).append(ranges)


def _inside(inner: Ranges, outer: Ranges) -> bool:
    return inner.keys() == outer.keys() and all(
        span is None or ((other := outer[name]) is not None and other[0] <= span[0] and span[1] <= other[1])
        for name, span in inner.items()
    )


def longest_first(dataset: Any, examples: Sequence[int]) -> list[int]:
    """Return examples by falling length of their ``input_ids``; in the given order where they have none."""
    if not examples or _length(_fetched(dataset, examples[0])) is None:
        return list(examples)
    lengths = {i: _length(_fetched(dataset, i)) or 0 for i in examples}
    return sorted(examples, key=lambda i: -lengths[i])


def _fetched(dataset: Any, i: int) -> Any:
    """Return an example as a data loader gets it: some data sets give lists of them alone."""
    return dataset.__getitems__([i])[0] if hasattr(dataset, "__getitems__") else dataset[i]


def _length(example: Any) -> int | None:
    ids = example.get("input_ids") if isinstance(example, Mapping) else None
    return len(ids) if isinstance(ids, Sized) else None


class PassQueue:
    """The passes through a model that are to come, as lists of examples for a data loader.

    Args:
        examples: indices into the data set.
        size: examples of a pass.
        shared: whether a pass serves a gradient for each of its examples.

    Attributes:
        examples: those of the pass that was asked for last.
        shared: whether that is shared.
    """

    def __init__(self, examples: Sequence[int], size: int, *, shared: bool = False) -> None:
        self._passes = deque((list(examples[i : i + size]), shared) for i in range(0, len(examples), size))
        self.examples: list[int] = []
        self.shared = shared

    def __iter__(self) -> Iterator[list[int]]:
        while self._passes:
            self.examples, self.shared = self._passes.popleft()
            # What collating draws, it has to draw again after `cut`.
            self._states = torch.get_rng_state(), random.getstate(), np.random.get_state()
            yield self.examples

    def cut(self) -> None:
        """Replace the last pass by one for each of its examples, and set random generators back to before it."""
        self._passes.extendleft(([example], False) for example in reversed(self.examples))
        ours, python, numpy = self._states
        torch.set_rng_state(ours)
        random.setstate(python)
        np.random.set_state(numpy)


def example_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Return about how many bytes a backward pass takes for each example of its batch.

    Measured in the forward pass of one example: twice what autograd keeps, since the outputs of layers and their
    gradients are kept too, and three times the largest tensor of it (logits, their softmax and their gradient).

    Args:
        model: the model, whose parameters and buffers do not count.
        loss: function that runs the model on one example.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss()
    del value  # up to here it keeps the tensors, and no address comes twice
    return 2 * sum(kept.values()) + 3 * max(kept.values(), default=0)


def memory_budget(given: int | None, device: torch.device, share: float) -> int:
    """Return the bytes that may be used on a device: those given, or a share of what is free."""
    if given is not None:
        return given
    # New weights, costs and passes need room beside the Fisher.
    return int(available_bytes(device) * share) if device.type in ("cpu", "cuda") else sys.maxsize


def device_of(model: nn.Module) -> torch.device:
    """Return where batches go.

    Raises:
        ValueError: some weights have no values.
    """
    if absent := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(
            f"{absent[0]} is on the meta device: accelerate has offloaded it, or it was never loaded; load the whole "
            "model onto a device, without offloading"
        )
    return next(model.parameters()).device
