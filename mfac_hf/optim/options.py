"""The options of an optimizer's window: one set for all parameter groups."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from mfac_hf.fisher.definite import is_number
from mfac_hf.fisher.options import WindowOptions

__all__ = ["ParameterWindowOptions", "SCHEDULED", "check_bool"]


# As window_device: in host memory, streamed to the parameters' device. On a CPU that is its memory, and nothing is.
HOST = "host"

# What may change between steps: the stored gradients are the same with any value of these.
SCHEDULED = ("damping", "grad_decay")


@dataclass(frozen=True, kw_only=True)
class ParameterWindowOptions(WindowOptions):
    """What `MFAC` adds to the options of a gradient window; it says what each means.

    Args:
        metric: ``"adam"`` or ``"identity"``; damping is relative in Adam's.
        window_device: kept as a string or a list of strings, which can be compared and saved; None for the
            parameters' device, ``"host"`` for host memory from which the window is streamed to that device.
        grad_decay: in [0, 1).
        nesterov: whether the average of the stored gradients looks one step ahead.
        row_sparse: whether gradients with few non-zero rows are stored by these rows.
        save_window: whether the window is part of a saved state.

    Raises:
        ValueError: for the first value out of range; names it, what was expected, and the way out.
    """

    metric: str = "identity"
    window_device: torch.device | str | list[torch.device | str] | None = None
    grad_decay: float = 0.0
    nesterov: bool = False
    row_sparse: bool = True
    save_window: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.grad_decay) or not 0.0 <= self.grad_decay < 1.0:
            raise ValueError(f"grad_decay is {self.grad_decay!r}; expected a number in [0, 1)")
        for name in ("nesterov", "row_sparse", "save_window"):
            check_bool(name, getattr(self, name))
        device: Any = self.window_device
        if isinstance(device, (list, tuple)):
            if not device:
                raise ValueError("window_device is an empty list; name at least one device, or leave it out")
            device = [_device_name(each) for each in device]
        elif device is not None and device != HOST:
            device = _device_name(device)
        object.__setattr__(self, "grad_decay", float(self.grad_decay))
        object.__setattr__(self, "window_device", device)  # the way to set a field of a frozen dataclass

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the options."""
        return tuple(field.name for field in fields(cls))

    def scheduled(self) -> dict[str, Any]:
        """The options that stand in the parameter groups, where a schedule may change them."""
        return {name: getattr(self, name) for name in SCHEDULED}

    @classmethod
    def pick(cls, settings: dict[str, Any]) -> "ParameterWindowOptions":
        """The options among an optimizer's settings."""
        return cls(**{name: settings[name] for name in cls.names() if name in settings})

    def devices(self, default: torch.device) -> list[torch.device]:
        """The devices to deal the columns out to, each once; ``default`` where none was named."""
        named = self.window_device if isinstance(self.window_device, list) else [self.window_device or default]
        return list(dict.fromkeys(torch.device("cpu" if device == HOST else device) for device in named))

    def compute_device(self, default: torch.device) -> torch.device | None:
        """Where a dense store is worked with, if not where it lies: on the parameters' device, ``default``."""
        return default if self.window_device == HOST else None

    @property
    def moment_itemsize(self) -> int:
        """Bytes of the second moment of one parameter; none in the identity metric."""
        return self.result_dtype.itemsize if self.metric == "adam" else 0

    @property
    def column_bytes(self) -> int:
        """Bytes of one parameter's column in a dense store, with its second moment."""
        return self.num_grads * self.window_dtype.itemsize + self.moment_itemsize

    @property
    def result_dtype(self) -> torch.dtype:
        """The type of directions, and of table values: float64 in a float64 window, else float32."""
        return torch.float64 if self.window_dtype == torch.float64 else torch.float32


def check_bool(name: str, value: Any) -> None:
    """Raise a ValueError unless an option is True or False: the text "false" counts as true."""
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's is bool_, or bool since numpy 2
        raise ValueError(f"{name} is {value!r}; expected True or False")


def _device_name(device: Any) -> str:
    """The name of a device that this machine has."""
    try:
        torch.empty(0, device=torch.device(str(device)))
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # as torch says it of each kind of device
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"window_device is {str(device)!r}, which cannot be used here ({reason}); expected None for the "
            "parameters' device, another such as 'cpu' or 'cuda:0', 'host', or a list of devices"
        ) from None
    return str(device)
