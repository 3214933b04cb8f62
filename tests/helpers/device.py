"""The device that the tests compute on: the CPU, or the one that the variable MFAC_TEST_DEVICE names.

Tests make their tensors without naming a device. Where another one is named, what *they* make is made on the CPU, so
that the numbers stay the same, and moved. What the library makes stays where it puts it: a tensor that it forgot on
the CPU has to show.
"""

import functools
import os
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["DEVICE", "OnDevice", "place"]

DEVICE = torch.device(os.environ.get("MFAC_TEST_DEVICE") or "cpu")

# As they stand in the names of code files: with links as they are.
_TESTS, _TORCH = str(Path(__file__).parents[1]) + os.sep, str(Path(torch.__file__).parent) + os.sep
_FACTORIES = {
    getattr(torch, name)
    for name in (
        "arange as_tensor empty eye from_numpy full linspace logspace ones rand randint randn randperm tensor "
        "tril_indices zeros"
    ).split()
}
_DRAWING = {getattr(torch.Tensor, name) for name in ("bernoulli_", "exponential_", "normal_", "random_", "uniform_")}
_LEAVING = {torch.Tensor.numpy, torch.Tensor.__array__}


class OnDevice(TorchFunctionMode):
    """Inside it, tensors that tests make without a device, also through modules of torch, are on ``device``."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _FACTORIES and kwargs.get("device") is None and _called_by_tests():
            requires_grad = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(self.device).requires_grad_(requires_grad)
        if func in _DRAWING and args[0].device != torch.device("cpu") and _called_by_tests():
            with torch.no_grad():
                return args[0].copy_(func(torch.empty_like(args[0], device="cpu"), *args[1:], **kwargs))
        if func in _LEAVING:
            args = (args[0].cpu(), *args[1:])
        return func(*args, **kwargs)


def place(cls):
    """Let tests make objects of a class on the device, where they name none and hand over no memory of their own."""
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        if (
            _called_by_tests()
            and not {"buffer", "buffers"} & kwargs.keys()
            and not (len(args) > 1 and isinstance(args[1], list))
        ):
            kwargs.setdefault("device", DEVICE)
        original(self, *args, **kwargs)

    cls.__init__ = __init__


def _called_by_tests():
    """Whether the nearest caller outside torch is a test or a helper of tests."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(_TESTS)
