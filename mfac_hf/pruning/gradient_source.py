"""What the steps of a pruning ask of the gradients for their Fisher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mfac_hf.pruning.options import Fisher

__all__ = ["Consumer", "GradientSet", "GradientSource", "hand_over"]

Consumer = Callable[[str, Tensor], None]


def hand_over(parameters: Mapping[str, nn.Parameter], waiting: list[list[Tensor]], consume: Consumer) -> None:
    """Hand the gradients that wait over, each a list by parameter, if there are any, and forget them."""
    for name, *rows in zip(parameters, *waiting, strict=True) if waiting else ():
        consume(name, torch.stack(rows))
    waiting.clear()


class GradientSource(Protocol):
    """Where the gradients of a pruning step come from.

    Attributes:
        fisher: ``"scaled"`` or ``"empirical"``, of which the gradients are (`PruningOptions`).
        process_group: ranks that take a share of the gradients each; None if every rank takes them all.
    """

    fisher: Fisher
    process_group: dist.ProcessGroup | None

    def check(self, num_grads: int, batch_norm_samples: int = 0) -> None:
        """Raise ValueError unless there are ``num_grads`` gradients, and examples for averages of batch norms."""

    def collect(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], num_grads: int, seed: int, consume: Consumer
    ) -> None:
        """Hand ``num_grads`` gradients of each parameter to ``consume(name, rows)``, rows being n x numel, float32.

        Rows may be overwritten once ``consume`` has returned. The same seed gives the gradients of the same examples,
        for whichever parameters.
        """

    def mean(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], num_grads: int, seed: int
    ) -> dict[str, Tensor]:
        """Return the gradient of the mean loss over the examples of :meth:`collect`: flat, float32, by name."""

    def average_batch_norms(self, model: nn.Module, count: int, seed: int) -> None:
        """Replace the statistics of batch norms by averages over ``count`` examples."""

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

    def mean(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return the gradient of the mean loss over all examples: flat, float32, by name."""
        return self.source.mean(self.model, parameters, self.num_grads, self.seed)
