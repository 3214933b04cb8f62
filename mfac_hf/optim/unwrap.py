"""The optimizer inside the wrapper that accelerate puts around it."""

from __future__ import annotations

from typing import Any

__all__ = ["unwrap_optimizer"]


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer that ``optimizer`` wraps, or ``optimizer`` itself where it wraps none (also None).

    Trainer's callbacks are handed accelerate's ``AcceleratedOptimizer`` once training has begun, and the bare
    optimizer before.
    """
    return getattr(optimizer, "optimizer", optimizer)
