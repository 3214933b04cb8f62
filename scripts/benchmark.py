"""Benchmarks, as ratios measured side by side: ``python scripts/benchmark.py --optimizer``.

    python scripts/benchmark.py --accuracy                       # error of the direction against float64, in seconds
    python scripts/benchmark.py --optimizer [--threads N]        # step time over the floor, beside AdamW and the paper
    python scripts/benchmark.py --optimizer --device cuda        # the same on a GPU
    python scripts/benchmark.py --epoch MODEL DATA               # an epoch of SST-2 with the published window

``--optimizer`` fills a window of m gradients of d numbers and times whole steps of MFAC. The floor is two reads of the
window, at the pace of the fastest of three ways to read it in the same round. Every round times each contender once,
so that all meet the same noise; figures are medians over rounds. Results go to ``--output`` as JSON, with the command
line and the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mfac_hf import MFAC
from mfac_hf.build import load_native
from mfac_hf.cli import cpu_name
from mfac_hf.fisher import GradientWindow
from mfac_hf.fisher.reference import PaperDynamicInverse, dense_fisher

GB = 1e9
WINDOW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmarks that the flags name, print their tables, and return what is written as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--accuracy", action="store_true", help="error of the direction against a dense float64 oracle"
    )
    parser.add_argument("--optimizer", action="store_true", help="time of an optimizer step")
    parser.add_argument(
        "--epoch",
        nargs=2,
        metavar=("MODEL", "DATA"),
        help="an epoch of SST-2 at m = 1024 beside AdamW, through run_glue.py",
    )
    parser.add_argument("--num_grads", type=int, nargs="+", default=[128, 512], help="window lengths m to time")
    parser.add_argument(
        "--dims", type=int, nargs="+", default=[300_000, 4_400_000], help="numbers of parameters d to time"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=None, help="write the results here as JSON")
    args = parser.parse_args(argv)
    if not (args.accuracy or args.optimizer or args.epoch):
        parser.error("nothing to do: pass --accuracy, --optimizer or --epoch")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"command": " ".join(["python", "scripts/benchmark.py", *(argv or sys.argv[1:])])}
    if args.accuracy:
        results["accuracy"] = benchmark_accuracy()
    if args.optimizer:
        device = torch.device(args.device)
        results["optimizer"] = [
            row
            for dim in args.dims
            for num_grads in args.num_grads
            for row in benchmark_step(num_grads, dim, args.rounds, device)
        ]
        print_steps(results["optimizer"])
    if args.epoch:
        results["epoch"] = benchmark_epoch(*args.epoch)
    results["machine"] = describe_machine(torch.device(args.device))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native_kernels": load_native(device.type),
    }


def synthetic_gradients(count: int, dim: int, norm: float, seed: int = 0) -> Iterator[Tensor]:
    """Gradients of a given norm: a random combination of 20 directions, plus noise of a third of its size."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(20, dim, generator=generator) / dim**0.5
    for _ in range(count):
        grad = torch.randn(20, generator=generator) @ basis / 20**0.5
        grad += 0.3 * torch.randn(dim, generator=generator) / dim**0.5
        yield grad * (norm / grad.norm())


def benchmark_accuracy(num_grads: int = 256, dim: int = 3000) -> list[dict[str, float]]:
    """Relative error of `F⁻¹ g` for the newest gradient against a dense float64 solve with the stored rows."""
    rows = []
    for norm in (0.1, 1.0, 10.0):
        for damping in (1e-5, 1e-6, 1e-8):
            window = GradientWindow(num_grads, dim, damping=damping)
            half = GradientWindow(num_grads, dim, damping=damping, dtype=torch.bfloat16)
            paper = PaperDynamicInverse(num_grads, dim, damping=damping)
            for grad in synthetic_gradients(num_grads + num_grads // 4, dim, norm):
                window.push(grad)
                half.push(grad)
                from_paper = paper.step(grad)
            oracle = torch.linalg.solve(dense_fisher(paper.grads_MD, damping), grad.double())

            def error(direction: Tensor, oracle: Tensor = oracle) -> float:
                return float((direction.double() - oracle).norm() / oracle.norm())

            bf16 = half.direction()
            rows.append(
                {
                    "norm": norm,
                    "damping": damping,
                    "float32": error(window.direction()),
                    "bfloat16": error(bf16),
                    "bfloat16_cosine": float(torch.cosine_similarity(bf16.double(), oracle, dim=0)),
                    "paper_float32": error(from_paper),
                }
            )
    table = Table(title=f"relative error of the direction against float64, m = {num_grads}, d = {dim}")
    for heading in ("|g|", "damping", "float32", "bfloat16", "cosine (bfloat16)", "paper, float32"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['norm']:g}",
            f"{row['damping']:g}",
            f"{row['float32']:.1e}",
            f"{row['bfloat16']:.1e}",
            f"{row['bfloat16_cosine']:.6f}",
            f"{row['paper_float32']:.1e}",
        )
    Console().print(table)
    return rows


def benchmark_step(num_grads: int, dim: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Median times of a step of MFAC with a full window, in both dtypes, of AdamW, and of the paper's algorithm."""
    rows = []
    for name, dtype in WINDOW_DTYPES.items():
        parameter = torch.nn.Parameter(torch.zeros(dim, device=device))
        optimizer = MFAC([parameter], lr=1e-6, num_grads=num_grads, damping=1e-4, window_dtype=dtype)
        parameter.grad = torch.randn(dim, device=device)
        optimizer.step()
        state = optimizer.state[parameter]
        buffer_MD = state["window"]
        for row in buffer_MD:  # a full window without the time of m steps; the Gram matrix of independent gradients
            row.copy_(torch.randn(dim, device=device))
        state["gram"].copy_(torch.eye(num_grads, dtype=torch.float64) * dim)
        state["pushed"] = num_grads
        optimizer._restore_window()
        adamw = torch.optim.AdamW([parameter], lr=1e-9)
        contenders: dict[str, Callable[[], Any]] = {"mfac": optimizer.step, "adamw": adamw.step}
        if dtype == torch.float32 and device.type == "cpu":
            paper = PaperDynamicInverse(1, 1, damping=1e-4)
            paper.grads_MD, paper.gram_MM = buffer_MD, state["gram"].float()
            contenders["paper"] = lambda paper=paper, grad=parameter.grad: paper.step(grad)
        readers = read_kernels(buffer_MD)
        times: dict[str, list[float]] = {key: [] for key in (*contenders, *readers)}
        for _ in range(rounds + 1):
            for key, run in (contenders | readers).items():
                times[key].append(seconds(run, device))
        medians = {key: statistics.median(values[1:]) for key, values in times.items()}
        # The machine's bandwidth changes from second to second: the floor of a round is twice its own fastest read.
        reads = [min(values) for values in zip(*(times[key][1:] for key in readers), strict=True)]
        floor = 2 * statistics.median(reads)
        over_floor = [step / (2 * read) for step, read in zip(times["mfac"][1:], reads, strict=True)]
        rows.append(
            {
                "num_grads": num_grads,
                "dim": dim,
                "window_dtype": name,
                "window_gib": buffer_MD.nbytes / (1 << 30),
                "read_gb_per_s": buffer_MD.nbytes / statistics.median(reads) / GB,
                "floor_ms": 1e3 * floor,
                "mfac_ms": 1e3 * medians["mfac"],
                "mfac_over_floor": statistics.median(over_floor),
                "adamw_ms": 1e3 * medians["adamw"],
                "mfac_over_adamw": medians["mfac"] / medians["adamw"],
                "paper_over_mfac": medians["paper"] / medians["mfac"] if "paper" in medians else None,
            }
        )
    return rows


def benchmark_epoch(model: str, data: str) -> dict[str, Any]:
    """Time and peak memory of an epoch of SST-2, batch 32, at the published m = 1024 beside AdamW; a process each."""
    contenders = {
        "adamw": ["--optim_name", "adamw"],
        "mfac_float32": ["--optim_name", "mfac", "--num_grads", "1024", "--damping", "1e-6"],
        "mfac_bfloat16": [
            "--optim_name",
            "mfac",
            "--num_grads",
            "1024",
            "--damping",
            "1e-6",
            "--window_dtype",
            "bfloat16",
        ],
    }
    rows: dict[str, Any] = {}
    for name, flags in contenders.items():
        with tempfile.TemporaryDirectory() as directory:
            script = Path(__file__).parent / "run_glue.py"
            common = ["--model_name_or_path", model, "--dataset_name", data, "--task_name", "sst2", "--do_train"]
            common += ["--num_train_epochs", "1", "--per_device_train_batch_size", "32", "--learning_rate", "1e-4"]
            common += [
                "--save_strategy",
                "no",
                "--report_to",
                "none",
                "--disable_tqdm",
                "true",
                "--output_dir",
                directory,
            ]
            subprocess.run([sys.executable, str(script), *common, *flags], check=True, stdout=subprocess.DEVNULL)
            written = json.loads((Path(directory) / "results.json").read_text())
        rows[name] = {"seconds": written["results"]["train_runtime"], "peak_gib": written["peak_memory_gib"]}
        rows[name]["over_adamw"] = rows[name]["seconds"] / rows["adamw"]["seconds"]
    table = Table(title="an epoch of SST-2, BERT-tiny, batch 32, m = 1024")
    for heading in ("optimizer", "seconds", "/ AdamW", "peak GiB of the process"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(name, f"{row['seconds']:.0f}", f"{row['over_adamw']:.2f}", f"{row['peak_gib']:.2f}")
    Console().print(table)
    return rows


def read_kernels(buffer_MD: Tensor) -> dict[str, Callable[[], Any]]:
    """Ways to read the whole window once; the fastest of them sets the floor."""
    words = buffer_MD.view(torch.float32) if buffer_MD.shape[1] % 2 == 0 else buffer_MD
    flat = words.reshape(-1)
    x = torch.ones(words.shape[1], dtype=words.dtype, device=words.device)
    z = torch.ones(words.shape[0], dtype=words.dtype, device=words.device)
    return {"sum": flat.sum, "mv": lambda: torch.mv(words, x), "mv_t": lambda: torch.mv(words.t(), z)}


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, with the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def print_steps(rows: list[dict[str, Any]]) -> None:
    """The step times as a table."""
    table = Table(title="one optimizer step, medians")
    for heading in (
        "d",
        "m",
        "window",
        "GiB",
        "read GB/s",
        "floor ms",
        "MFAC ms",
        "/ floor",
        "/ AdamW",
        "paper / MFAC",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['dim']:,}",
            str(row["num_grads"]),
            row["window_dtype"],
            f"{row['window_gib']:.2f}",
            f"{row['read_gb_per_s']:.1f}",
            f"{row['floor_ms']:.1f}",
            f"{row['mfac_ms']:.1f}",
            f"{row['mfac_over_floor']:.2f}",
            f"{row['mfac_over_adamw']:.1f}",
            "-" if row["paper_over_mfac"] is None else f"{row['paper_over_mfac']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
