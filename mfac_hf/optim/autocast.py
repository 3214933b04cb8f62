"""A step computes in the types that it chose: autocast, where a caller has left it on, would round its products."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["without_autocast"]


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn autocast off where it is on: the types that it lowers would change digits of the window's products."""
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
