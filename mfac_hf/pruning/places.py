"""The places of the weights that are left: what the blocks of a Fisher are made of.

Where single weights are pruned, a block has consecutive weights of those that are left. It sees more of what they do
to each other than a block of all places would, most of which are empty in the end, and blocks are fewer. Units and
windows of a pattern have to lie in one block, so theirs are of all places. The experts of one target have no block in
common: what is left of each is filled up with one of its pruned places.

Shape suffixes: D all weights of a target, L those that are left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mfac_hf.pruning.patterns import Pattern

__all__ = ["Places"]


@dataclass(frozen=True)
class Places:
    """Places of a target's weights.

    Attributes:
        numel: weights of the target, pruned or not.
        at_L: places of those that are left, in order; None for all places.
    """

    numel: int
    at_L: Tensor | None

    @classmethod
    def of(cls, kept_D: Tensor, pattern: Pattern, block_size: int, experts: int = 1) -> Places:
        """Make the places for a mask; where nothing is left there is one, a pruned one, since no Fisher is empty."""
        if pattern.unit > 1 or pattern.window > 1 or bool(kept_D.all()):
            return cls(len(kept_D), None)
        parts, start = [], 0
        for part_P in kept_D.chunk(experts):
            at_P = part_P.nonzero().squeeze(1)
            if experts > 1 and not bool(part_P.all()):
                at_P = torch.cat([at_P, part_P.logical_not().nonzero()[0].expand(-len(at_P) % block_size)])
            parts.append(at_P + start)
            start += len(part_P)
        at_L = torch.cat(parts)
        return cls(len(kept_D), at_L if len(at_L) else at_L.new_zeros(1))

    def __len__(self) -> int:
        return self.numel if self.at_L is None else len(self.at_L)

    def cut(self, rows_D: Tensor) -> Tensor:
        """Return the numbers at these places, of a vector or of each row."""
        return rows_D if self.at_L is None else rows_D.index_select(-1, self.at_L)

    def spread(self, values_L: Tensor, elsewhere: float = 0.0) -> Tensor:
        """Return the whole vector that has these numbers at these places."""
        if self.at_L is None:
            return values_L
        return torch.full((self.numel,), elsewhere, dtype=values_L.dtype, device=values_L.device).index_copy_(
            0, self.at_L, values_L
        )
