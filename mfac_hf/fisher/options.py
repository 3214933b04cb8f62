"""The options of a gradient window, checked when they are put together."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from mfac_hf.fisher.definite import check_damping

__all__ = ["MAX_NORM", "NORMALIZATIONS", "WINDOW_DTYPES", "WindowOptions"]

NORMALIZATIONS = ("num_grads", "count")
WINDOW_DTYPES = (torch.float32, torch.bfloat16, torch.float64)

# The square of a larger norm overflows float32, in which products are computed: an infinite Gram matrix has no factor.
MAX_NORM = 1e19


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    r"""How many gradients a window holds, in which type, and how their Fisher is damped.

    >>> WindowOptions(num_grads=0, damping=1e-6)
    Traceback (most recent call last):
    ValueError: num_grads is 0; expected a whole number of gradients, at least 1

    Args:
        num_grads: length of the window, m >= 1.
        damping: :math:`\lambda > 0`, in units of a squared gradient entry.
        normalize: n in :math:`F = \lambda I + G^\top G / n`: ``"num_grads"`` divides by m always, as the paper does,
            also while the window is filling; ``"count"`` divides by the gradients held so far. The same once the
            window is full.
        window_dtype: storage of the window: float32, bfloat16 or float64.

    Raises:
        ValueError: for the first value out of range; names it, what was expected, and the way out.
    """

    num_grads: int
    damping: float
    normalize: str = "num_grads"
    window_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        length: Any = self.num_grads
        if isinstance(length, bool) or not isinstance(length, Integral) or length < 1:
            raise ValueError(f"num_grads is {length!r}; expected a whole number of gradients, at least 1")
        # Python's own types are what can be saved. This is the way to set a field of a frozen dataclass.
        object.__setattr__(self, "num_grads", int(length))
        object.__setattr__(self, "damping", check_damping(self.damping))
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(
                f"normalize is {self.normalize!r}; expected one of {', '.join(map(repr, NORMALIZATIONS))}"
            )
        if self.window_dtype not in WINDOW_DTYPES:
            allowed = ", ".join(map(str, WINDOW_DTYPES))
            raise ValueError(f"window_dtype is {self.window_dtype!r}; expected one of {allowed}")
