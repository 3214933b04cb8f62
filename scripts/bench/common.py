"""What every benchmark needs: the machine that the figures depend on, and a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from mfac_hf.machine import cpu_name
from mfac_hf.ops.build import load_native


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native_kernels": load_native(device.type),
    }


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, with the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
