r"""The length of a first-order step, searched on held-out examples.

The quadratic model of the loss around weights that were pruned has a gradient: removing weights took them away from
the minimum. A step of the survivors along :math:`-F_{SS}^{-1} \bar g_S`, :math:`\bar g` being the mean gradient of the
loss, repairs a part of that. In blocks all blocks step at once, each as if the others stood still, so the full step
overshoots by far; the loss of examples that gave no gradients decides how far to go.

Source of the term: Benbaki, Chen, Meng, Hazimeh, Ponomareva, Zhao and Mazumder, "Fast as CHITA: Neural Network Pruning
with Combinatorial Optimization", ICML 2023, where it is part of the objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["LengthSearch"]

# Losses measured for a step at most, beside that of the weights as they are.
_TRIALS = 8


@dataclass
class LengthSearch:
    """Lengths of one step after the other; each search begins with the last length that lowered the loss.

    Attributes:
        length: where the next search begins. On ResNet-20 0.01 to 0.03 was best after each pruning.
        steps: of each step ``length`` (0 if none made the loss lower), ``loss_before`` and ``loss_after`` (None
            where they are not finite).
    """

    length: float = 0.02
    steps: list[dict[str, float | None]] = field(default_factory=list)

    def find(self, loss: Callable[[float], float]) -> float:
        """Return the length with the lowest loss among those tried, 0 where none is below the loss of no step.

        From the first one, lengths are doubled while that lowers the loss, or else halved until that raises it again.

        Args:
            loss: returns the held-out loss after a step of a length; NaN counts as infinite.
        """
        tried = {0.0: _finite(loss(0.0))}

        def at(length: float) -> float:
            if length not in tried:
                tried[length] = _finite(loss(length)) if len(tried) <= _TRIALS else math.inf
            return tried[length]

        length = self.length
        if at(2 * length) < at(length):
            while at(4 * length) < at(2 * length):
                length *= 2
        else:
            while at(length / 2) < at(length) or at(length) >= tried[0.0]:
                length /= 2
                if len(tried) > _TRIALS:
                    break
        best = min(tried, key=tried.__getitem__)
        self.length = best or self.length
        before, after = (loss if math.isfinite(loss) else None for loss in (tried[0.0], tried[best]))
        self.steps.append({"length": best, "loss_before": before, "loss_after": after})
        return best


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
