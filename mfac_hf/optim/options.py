"""The options of an optimizer's window: one set for all parameter groups."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from mfac_hf.fisher.options import WindowOptions

__all__ = ["ParameterWindowOptions"]


@dataclass(frozen=True, kw_only=True)
class ParameterWindowOptions(WindowOptions):
    """What `MFAC` adds to the options of a gradient window; it says what each means.

    Args:
        window_device: kept as a string or a list of strings, which can be compared and saved; None for the
            parameters' device.
        grad_decay: in [0, 1).
        row_sparse: whether gradients with few non-zero rows are stored by these rows.
        save_window: whether the window is part of a saved state.

    Raises:
        ValueError: for the first value out of range; names it, what was expected, and the way out.
    """

    window_device: torch.device | str | list[torch.device | str] | None = None
    grad_decay: float = 0.0
    row_sparse: bool = True
    save_window: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.grad_decay < 1.0:
            raise ValueError(f"grad_decay is {self.grad_decay!r}; expected a number in [0, 1)")
        device: Any = self.window_device
        if isinstance(device, (list, tuple)):
            if not device:
                raise ValueError("window_device is an empty list; name at least one device, or leave it out")
            device = [str(each) for each in device]
        elif device is not None:
            device = str(device)
        object.__setattr__(self, "window_device", device)  # the way to set a field of a frozen dataclass

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the options."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def pick(cls, settings: dict[str, Any]) -> "ParameterWindowOptions":
        """The options among an optimizer's settings."""
        return cls(**{name: settings[name] for name in cls.names()})

    def devices(self, default: torch.device) -> list[torch.device]:
        """The devices to deal the columns out to, each once; ``default`` where none was named."""
        named = self.window_device if isinstance(self.window_device, list) else [self.window_device or default]
        return list(dict.fromkeys(map(torch.device, named)))

    @property
    def result_dtype(self) -> torch.dtype:
        """The type of directions, and of table values: float64 in a float64 window, else float32."""
        return torch.float64 if self.window_dtype == torch.float64 else torch.float32
