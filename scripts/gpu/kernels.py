"""The kernels: built for the device, right, clean under compute-sanitizer, and what they and a step cost."""

from __future__ import annotations

import time
from typing import Any

import torch
from bench import cost, kernels

from gpu.part import Context, NotCheckedError, require, run_tests
from mfac_hf.ops import build, cuda_toolkit

OPERATORS = [f"tests/ops/test_{name}.py" for name in ("window", "metric", "coefficients", "blocks", "rows")]


def build_kernels(context: Context) -> dict[str, Any]:
    """Build the kernels for the device that accelerate chooses, as a first step would."""
    from accelerate import PartialState

    chosen = PartialState(cpu=context.rehearsal).device
    require(chosen.type == context.kind, f"accelerate chose {chosen}; this check is of {context.device}")
    built = build.native_status(chosen.type)
    begun = time.perf_counter()
    library = build.build_native(chosen.type)
    seconds = time.perf_counter() - begun
    require(build.load_native(chosen.type), build.native_status(chosen.type))
    nvcc = cuda_toolkit.find_nvcc()
    found = {
        "chosen_by_accelerate": str(chosen),
        "before": built,
        "library": library.name,
        "build_seconds": seconds,
        "nvcc": cuda_toolkit.toolkit_version(nvcc) if nvcc else None,
        "torch_cuda": torch.version.cuda,
        "architectures": cuda_toolkit.architectures(),
    }
    print(f"built for {chosen} in {seconds:.0f} s (nvcc {found['nvcc']}, torch for CUDA {found['torch_cuda']})")
    return found


def run_operator_tests(context: Context) -> dict[str, Any]:
    """Each operator against float64 by its tests: native where there is a kernel, and PyTorch's on this device."""
    return run_tests(context.kind, OPERATORS)


def check_kernels(context: Context) -> dict[str, Any]:
    """Published shapes and more than 2^31 numbers, memory full of NaN, repeats, another stream, a CUDA graph."""
    if context.rehearsal:
        kernels.SHAPES = [shape for shape in kernels.SHAPES if shape[0] * shape[1] < 1 << 23]
        kernels.available_bytes = lambda device: 0  # leaves out the window of 2^31 numbers
    results = kernels.check_kernels(context.device)
    kernels.print_checks(results)
    checks = results["checks"]["against_float64"]
    wrong = [row for row in checks if not row["passed"]]
    require(not wrong, f"{len(wrong)} of {len(checks)} shapes are wrong against float64: {wrong}")
    for name in ("repeats", "stream", "graph", "large"):
        passed = results.get(name, {"passed": None})["passed"]
        require(passed or (passed is None and (context.rehearsal or name == "large")), f"{name}: {results.get(name)}")
    return results


def sanitize(context: Context) -> dict[str, Any]:
    """The kernels without torch, plain and under each tool of compute-sanitizer."""
    if context.rehearsal:
        raise NotCheckedError("compute-sanitizer needs a GPU; the tests run the emulated kernels under sanitizers")
    found = kernels.run_sanitizer()
    print(f"exit codes: {found.get('exit_codes')}")
    if found["passed"] is not False and found["reason"]:
        raise NotCheckedError(f"{found['reason']}; exit codes so far: {found.get('exit_codes')}")
    require(found["passed"], f"exit codes {found['exit_codes']}")
    return found


def measure_cost(context: Context) -> dict[str, Any]:
    """A step beside fused AdamW, and the passes over published windows beside a copy."""
    if context.rehearsal:
        models, lengths, shapes, rounds = ["0.4M"], [8], [(64, 100_000)], 2
    else:
        models, lengths, shapes, rounds = ["4.4M", "23M", "110M"], [8, 16], kernels.TIMED["cuda"], 7
    steps = [row for name in models for m in lengths for row in cost.benchmark_cost(name, m, rounds, context.device)]
    cost.print_cost(steps)
    if not context.rehearsal:
        torch.cuda.empty_cache()
    passes = [row for m, d in shapes for row in kernels.time_kernels(m, d, context.device, rounds)]
    kernels.print_timing(passes)
    return {"steps": steps, "passes": passes}
