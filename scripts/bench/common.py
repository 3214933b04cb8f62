"""What every benchmark needs: a description of the machine, a clock, processes, and tables."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from mfac_hf.machine import cpu_name
from mfac_hf.ops.build import load_native

GB = 1e9


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on: processor, device, threads, torch, native kernels."""
    return {
        "processor": cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native_kernels": load_native(device.type),
    }


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time one call, with the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a fresh process, because the peak memory of a process never falls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(function, args)
        pool.close()
        pool.join()  # it ends by itself, and tidies up
    return result


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table in Markdown, so that `docs/benchmarks/` and reports take it as it is."""
    print(f"\n{title}\n")
    for cells in (headings, ["---"] * len(headings), *rows):
        print("|", " | ".join(map(str, cells)), "|")
