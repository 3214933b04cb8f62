"""The two passes over the window by themselves, on a CPU or a GPU: whether they are right, repeatable and fast.

Checks come first: against float64, with memory full of NaN, odd shapes and shapes of BERT sizes; more than 2^31
numbers; 200 repeats to the bit; on a GPU also another stream, the replay of a CUDA graph, and compute-sanitizer on the
kernels without torch (`tests/csrc/emulation/check_kernels.cu`). Then the passes are timed beside torch's own products,
a copy, and the Cholesky factorisation of a step.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import GB, print_table, seconds
from mfac_hf.machine import available_bytes
from mfac_hf.ops import build, cuda_toolkit
from mfac_hf.ops.window import combine, row_dots

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHECK_SOURCE = Path(__file__).parents[2] / "tests" / "csrc" / "emulation" / "check_kernels.cu"
# Odd on purpose: rows that are not aligned to 16 bytes, groups of rows and columns that are not whole.
SHAPES = [(1, 1), (7, 8191), (33, 16_387), (129, 100_003), (1025, 4099), (4096, 2050), (4096, 8192)]
# Published windows: BERT-tiny without its embeddings and with them, and BERT-mini without them.
TIMED = {"cpu": [(512, 1_000_000), (512, 4_400_000)], "cuda": [(1024, 413_826), (1024, 3_200_000), (1024, 4_400_000)]}
ALLOWED = 1e-6  # error in units of |g||x| (dot product) or of the sum of magnitudes (combination), as in the tests


def benchmark_kernels(device: torch.device, shapes: list[tuple[int, int]], rounds: int) -> dict[str, Any]:
    """Check and time the native kernels on this device.

    Raises:
        RuntimeError: there are none; the message has the reason.
    """
    results = check_kernels(device)
    if device.type == "cuda":
        results["sanitizer"] = run_sanitizer()
    results["timing"] = [row for m, d in shapes for row in time_kernels(m, d, device, rounds)]
    return results


def check_kernels(device: torch.device) -> dict[str, Any]:
    """Check the native kernels on this device, within torch.

    Raises:
        RuntimeError: there are none; the message has the reason.
    """
    if not build.load_native(device.type):
        raise RuntimeError(f"no native kernels for {device.type}: {build.native_status(device.type)}")
    checks = {"against_float64": [check(m, d, name, device) for m, d in SHAPES for name in DTYPES]}
    results: dict[str, Any] = {"checks": checks, "large": check_large(device), "repeats": check_repeats(device)}
    if device.type == "cuda":
        results |= {"stream": check_stream(device), "graph": check_graph(device)}
    return results


def draw(m: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a window, a vector and coefficients."""
    generator = torch.Generator(device).manual_seed(m + d)
    grads = torch.empty(m, d, dtype=dtype, device=device)
    for row in grads:
        row.copy_(torch.randn(d, generator=generator, device=device))
    x = torch.randn(d, generator=generator, device=device)
    return grads, x, torch.randn(m, generator=generator, device=device, dtype=torch.float64)


def poison(m: int, d: int, device: torch.device) -> None:
    """Leave NaN in memory of the sizes that results and scratch memory will have."""
    sizes = [m * 8, d * 4, m * -(-d // 8192) * 8]
    blocks = [torch.full((size // 4,), torch.nan, device=device) for size in sizes for _ in range(3)]
    blocks.clear()


def check(m: int, d: int, name: str, device: torch.device) -> dict[str, Any]:
    """Measure the largest error of both kernels in units of what is allowed; NaN where a result was not written."""
    grads, x, weights = draw(m, d, DTYPES[name], device)
    poison(m, d, device)
    dots, total = row_dots(grads, x), combine(grads, weights, x, 0.5, 2.0)
    wide = grads.double()
    dots_error = ((dots - wide @ x.double()).abs() / (wide.norm(dim=1) * x.double().norm())).max()
    exact = 0.5 * x.double() + 2 * (weights @ wide)
    scale = 0.5 * x.double().abs() + 2 * (weights.abs() @ wide.abs())
    sum_error = ((total - exact).abs() / scale).max()
    errors = {"row_dots": float(dots_error) / ALLOWED, "combine": float(sum_error) / ALLOWED}
    return {"num_grads": m, "dim": d, "window_dtype": name, **errors, "passed": max(errors.values()) <= 1}


def check_large(device: torch.device) -> dict[str, Any]:
    """Check a window of more than 2^31 numbers: rows of ones and a last row of twos, whose products are known."""
    m, d = 2049, (1 << 20) + 1
    if available_bytes(device) < 1.3 * 2 * m * d:
        return {"passed": None, "reason": f"needs {2 * m * d >> 30} GiB in bfloat16"}
    grads = torch.ones(m, d, dtype=torch.bfloat16, device=device)
    grads[-1] = 2.0
    dots = row_dots(grads, torch.ones(d, device=device))
    weights = torch.zeros(m, dtype=torch.float64, device=device)
    weights[-1] = 3.0
    good = bool((dots[:-1] == d).all()) and float(dots[-1]) == 2 * d
    return {"elements": m * d, "passed": good and bool((combine(grads, weights) == 6).all())}


def check_repeats(device: torch.device, repeats: int = 200) -> dict[str, Any]:
    """Check that every call gives the same bits."""
    passed = True
    for dtype in DTYPES.values():
        grads, x, weights = draw(67, 20_011, dtype, device)
        dots, total = row_dots(grads, x), combine(grads, weights, x)
        for _ in range(repeats):
            passed &= torch.equal(row_dots(grads, x), dots)
            passed &= torch.equal(combine(grads, weights, x), total)
    return {"repeats": repeats, "passed": passed}


def check_stream(device: torch.device) -> dict[str, Any]:
    """Check that the kernels run on the current stream, after what it does before."""
    grads, x, weights = draw(65, 300_001, torch.float32, device)
    dots, total = row_dots(grads, 2 * x), combine(grads, weights, 2 * x)
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        doubled = 2 * x
        found = row_dots(grads, doubled), combine(grads, weights, doubled)
    stream.synchronize()
    return {"passed": torch.equal(found[0], dots) and torch.equal(found[1], total)}


def check_graph(device: torch.device) -> dict[str, Any]:
    """Check that a captured graph computes with what its inputs hold when it is replayed."""
    grads, x, weights = draw(65, 30_001, torch.bfloat16, device)
    row_dots(grads, x), combine(grads, weights, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = row_dots(grads, x), combine(grads, weights, x)
    x.mul_(-3.0)
    weights.add_(1.0)
    graph.replay()
    passed = torch.equal(found[0], row_dots(grads, x)) and torch.equal(found[1], combine(grads, weights, x))
    return {"passed": passed}


def run_sanitizer() -> dict[str, Any]:
    """Run the kernels without torch, plain and under each tool of compute-sanitizer."""
    nvcc = cuda_toolkit.find_nvcc()
    home = cuda_toolkit.toolkit_home(nvcc) if nvcc else None
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=str(home / "bin") if home else ""
    )
    if nvcc is None:
        return {"passed": None, "reason": "nvcc was not found"}
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "check"
        flags = [*build.NVCC_FLAGS, "-lineinfo", f"-I{build.CSRC}", f"-arch=sm_{cuda_toolkit.architectures()[0]}"]
        sources = [str(build.CSRC / "mfac_kernels.cu"), str(CHECK_SOURCE)]
        subprocess.run([nvcc, *flags, *sources, "-o", str(program)], check=True)
        commands = {"plain": [str(program)]}
        if sanitizer is not None:
            for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
                commands[tool] = [sanitizer, "--tool", tool, "--error-exitcode", "98", str(program), "few"]
        codes = {}
        for name, command in commands.items():
            codes[name] = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=300).returncode
    reason = None if sanitizer is not None else "compute-sanitizer was not found"
    return {"exit_codes": codes, "passed": not any(codes.values()), "reason": reason}


def time_kernels(m: int, d: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Time the passes for both storage types: medians over rounds in which each contender runs once."""
    grads, x, weights = draw(m, d, torch.float32, device)
    half = torch.empty(m, d, dtype=torch.bfloat16, device=device)
    for narrow, row in zip(half, grads, strict=True):
        narrow.copy_(row)
    target = torch.empty(max(1, grads.numel() // 4), device=device)
    source = grads.view(-1)[: len(target)]
    gram = torch.eye(m, dtype=torch.float64, device=device) * 2 + 1 / m
    weights32, weights16, x16 = weights.float(), weights.bfloat16(), x.bfloat16()
    contenders: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "float32 row_dots": lambda: row_dots(grads, x),
        "float32 row_dots torch": lambda: torch.mv(grads, x),
        "float32 combine": lambda: combine(grads, weights),
        "float32 combine torch": lambda: torch.mv(grads.t(), weights32),
        "bfloat16 row_dots": lambda: row_dots(half, x),
        "bfloat16 row_dots torch": lambda: torch.mv(half, x16),
        "bfloat16 combine": lambda: combine(half, weights),
        "bfloat16 combine torch": lambda: torch.mv(half.t(), weights16),
        "cholesky": lambda: torch.linalg.cholesky_ex(gram),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            times[name].append(seconds(run, device))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    ceiling = 2 * target.nbytes / medians["copy"]  # read and written
    rows = []
    for dtype, window in (("float32", grads), ("bfloat16", half)):
        for kernel in ("row_dots", "combine"):
            name = f"{dtype} {kernel}"
            rows.append(
                {
                    "num_grads": m,
                    "dim": d,
                    "window_dtype": dtype,
                    "kernel": kernel,
                    "ms": 1e3 * medians[name],
                    "gb_per_s": window.nbytes / medians[name] / GB,
                    "copy_gb_per_s": ceiling / GB,
                    "of_copy": window.nbytes / medians[name] / ceiling,
                    "torch_float32_over_native": medians[f"float32 {kernel} torch"] / medians[name],
                    "torch_same_over_native": medians[f"{name} torch"] / medians[name],
                    "cholesky_ms": 1e3 * medians["cholesky"],
                }
            )
    return rows


def print_kernels(results: dict[str, Any]) -> None:
    """Print the outcome of each check, and the times as a table."""
    print_checks(results)
    print_timing(results["timing"])


def print_checks(results: dict[str, Any]) -> None:
    """Print the outcome of each check."""
    checks = results["checks"]["against_float64"]
    worst = max((max(row["row_dots"], row["combine"]) for row in checks), key=lambda error: (error != error, error))
    print(f"against float64: {sum(row['passed'] for row in checks)} of {len(checks)} passed, worst {worst:.2f}")
    for name in ("large", "repeats", "stream", "graph", "sanitizer"):
        if name in results:
            print(f"{name}: {results[name]}")


def print_timing(rows: list[dict[str, Any]]) -> None:
    """Print the times as a table."""
    columns = {
        "d": ("dim", "{:,}"),
        "m": ("num_grads", "{}"),
        "window": ("window_dtype", "{}"),
        "pass": ("kernel", "{}"),
        "ms": ("ms", "{:.2f}"),
        "GB/s": ("gb_per_s", "{:.1f}"),
        "/ copy": ("of_copy", "{:.2f}"),
        "torch float32 /": ("torch_float32_over_native", "{:.2f}"),
        "torch same type /": ("torch_same_over_native", "{:.2f}"),
        "Cholesky ms": ("cholesky_ms", "{:.1f}"),
    }
    print_table(
        "a pass over the window, medians",
        list(columns),
        ([form.format(row[key]) for key, form in columns.values()] for row in rows),
    )
