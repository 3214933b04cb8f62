"""Gradients for the Fisher of a model, from the window of its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from mfac_hf.optim.mfac import MFAC
from mfac_hf.optim.unwrap import unwrap_optimizer
from mfac_hf.pruning.gradient_source import Consumer, GradientSource
from mfac_hf.pruning.options import Fisher

__all__ = ["WindowGradients"]


class WindowGradients:
    """The newest gradients in the window of an `MFAC`, which need no backward pass.

    They are the gradients of training: of batches, averaged over accumulation and ranks, clipped, with coupled weight
    decay, and taken at the weights of the last steps. Their examples cannot be told apart any more, so they cannot be
    scaled: the Fisher is the empirical one.

    Args:
        optimizer: the optimizer, bare or as accelerate wraps it.
        losses: source of the loss on held-out examples; None where nobody asks for it.

    Raises:
        ValueError: the optimizer is no `MFAC`, or its window is spread over ranks.
    """

    def __init__(self, optimizer: Any, losses: GradientSource | None) -> None:
        optimizer = unwrap_optimizer(optimizer)
        if not isinstance(optimizer, MFAC):
            raise ValueError(
                f"gradients='optimizer' needs MFAC as the optimizer, not {type(optimizer).__name__}; use 'data'"
            )
        if optimizer.shares_window:
            raise ValueError(
                "gradients='optimizer' needs a whole window on each rank, and ranks share it; use 'data', or build "
                "MFAC with process_group=None"
            )
        optimizer.keep_window_whole()
        self.optimizer = optimizer
        self.losses = losses
        self.fisher: Fisher = "empirical"
        # Under DistributedDataParallel all ranks hold the same window.
        self.process_group: dist.ProcessGroup | None = None

    def check(self, num_grads: int, batch_norm_samples: int = 0) -> None:
        """Raise ValueError unless the window holds ``num_grads`` gradients."""
        self._check(num_grads, round(self.optimizer.window_stats()["window_fill"] * self._size))

    def check_at_step(self, num_grads: int, step: int) -> None:
        """Raise ValueError unless the window can hold ``num_grads`` gradients when training gets to this step."""
        self._check(num_grads, min(step, self._size))

    @property
    def _size(self) -> int:
        return self.optimizer.defaults["num_grads"]

    def _check(self, num_grads: int, held: int) -> None:
        if held < num_grads:
            raise ValueError(
                f"{num_grads} gradients were asked for, and at the pruning the optimizer's window holds {held} of at "
                f"most {self._size}; prune later, lower num_grads, or take gradients='data'"
            )

    def collect(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], num_grads: int, seed: int, consume: Consumer
    ) -> None:
        """Hand the newest ``num_grads`` gradients of each parameter to ``consume(name, rows)``, n x numel, float32.

        Raises:
            ValueError: the window holds fewer, or none of a parameter (it is frozen, or not in the optimizer).
        """
        self.check(num_grads)
        for name, parameter in parameters.items():
            consume(name, self.optimizer.stored_gradients(parameter)[-num_grads:].to(parameter.device).float())

    def mean(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], num_grads: int, seed: int
    ) -> dict[str, Tensor]:
        """Refuse: the window holds gradients at the weights of earlier steps.

        Raises:
            ValueError: always.
        """
        raise ValueError("a first-order step needs gradients at the pruned weights: take gradients='data'")

    def average_batch_norms(self, model: nn.Module, count: int, seed: int) -> None:
        """Refuse: the window holds no examples.

        Raises:
            ValueError: always.
        """
        raise ValueError("batch norms are averaged over examples: take gradients='data'")

    def loss(self, model: nn.Module) -> float | None:
        """Return the loss on held-out examples; None where there are none."""
        return None if self.losses is None else self.losses.loss(model)
