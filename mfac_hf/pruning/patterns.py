"""Sparsity patterns: which weights may be pruned together, and how many of a group.

A pattern runs along the rows of a weight matrix. A row has all weights of one output: the matrix is (out, in) of a
linear layer, (out, in * height * width) of a convolution. Weights are flat and row-major, so consecutive weights of a
row have consecutive positions.

Shape suffixes: D weights, U units, G groups.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Pattern"]


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern.

    Attributes:
        name: the name that `parse` reads.
        unit: consecutive weights that are pruned together, as one unit (4 for ``"block4"``, else 1).
        window: M of N:M, else 1.
        kept: N of N:M, the units that stay in each window of M at full sparsity; else 0.
    """

    name: str
    unit: int = 1
    window: int = 1
    kept: int = 0

    @classmethod
    def parse(cls, name: "str | Pattern") -> "Pattern":
        """Return the pattern of this name.

        ``"unstructured"``; ``"N:M"`` (such as ``"2:4"``: N of every M consecutive weights stay); or ``"blockK"`` (such
        as ``"block4"``: K consecutive weights stay or go together).

        Raises:
            ValueError: another name, or numbers that make no pattern.
        """
        if isinstance(name, Pattern):
            return name
        if name == "unstructured":
            return cls(name)
        if match := re.fullmatch(r"(\d+):(\d+)", name):
            kept, window = int(match[1]), int(match[2])
            if 0 < kept < window:
                return cls(name, window=window, kept=kept)
        if match := re.fullmatch(r"block(\d+)", name):
            if int(match[1]) >= 2:
                return cls(name, unit=int(match[1]))
        raise ValueError(
            f"pattern is {name!r}; expected 'unstructured', 'N:M' with 0 < N < M such as '2:4', or 'blockK' with "
            "K >= 2 such as 'block4'"
        )

    @property
    def span(self) -> int:
        """Number of consecutive weights under one constraint; widths and block sizes have to be multiples of it."""
        return max(self.unit, self.window)

    @property
    def max_sparsity(self) -> float:
        """Largest sparsity that the pattern allows: 1 - N/M for N:M, else 1."""
        return 1 - self.kept / self.window

    def check(self, name: str, weight: Tensor, keep: Tensor | None = None, block_size: int | None = None) -> None:
        """Raise ValueError, with the way out, where this pattern does not fit a tensor.

        Args:
            name: name of the tensor, for the message.
            weight: tensor of shape (out, ...).
            keep: bool mask of what is kept so far, with as many entries; None if all is kept.
            block_size: block size of its Fisher matrix; None without blocks.
        """
        width = weight.numel() // weight.shape[0] if weight.ndim > 1 else weight.numel()
        if width % self.span:
            raise ValueError(
                f"{name} has rows of {width} weights (shape {tuple(weight.shape)}), not a multiple of {self.span}, "
                f"which the pattern {self.name!r} needs: leave it out of the targets, or use 'unstructured'"
            )
        if block_size is not None and block_size % self.span:
            above = -(-block_size // self.span) * self.span
            raise ValueError(
                f"block_size is {block_size}, not a multiple of {self.span}, so blocks would cut groups of the "
                f"pattern {self.name!r}: use {above}"
            )
        if keep is None or keep.all():
            return
        kept_GS = keep.reshape(-1, self.span).sum(dim=1)
        broken_G = (kept_GS > 0) & (kept_GS < self.span) if self.unit > 1 else kept_GS < self.kept
        if bool(broken_G.any()):
            raise ValueError(
                f"{name} is sparse already, and {int(broken_G.sum())} of its {len(broken_G)} groups of {self.span} do "
                f"not fit the pattern {self.name!r}: start from a dense model, or use 'unstructured'"
            )

    def restrict(self, costs_U: Tensor) -> Tensor:
        """Return the costs with infinity for the units that have to stay: the N dearest of each window.

        Args:
            costs_U: cost of pruning each unit, infinite for units that are pruned already.
        """
        if self.window == 1:
            return costs_U
        costs_GS = costs_U.reshape(-1, self.window).clone()
        # Pruned units (infinite) must not take the place of those that stay.
        pruned_GS = costs_GS.isinf()
        dearest_GN = torch.where(pruned_GS, -1.0, costs_GS).topk(self.kept, dim=1).indices
        return costs_GS.scatter_(1, dearest_GN, float("inf")).view_as(costs_U)
