"""The time of an optimizer step over the floor, beside AdamW and the paper's algorithm; and of an epoch of SST-2.

The floor is the time of two reads of the window, by the fastest of three ways to read it in the same round.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import GB, print_table, seconds
from mfac_hf import MFAC
from mfac_hf.fisher.reference import PaperDynamicInverse
from mfac_hf.machine import GIB

WINDOW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RUN_GLUE = Path(__file__).parents[1] / "run_glue.py"


def benchmark_step(num_grads: int, dim: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Time a step of MFAC with a full window, in both dtypes, of AdamW, and of the paper's algorithm; medians."""
    rows = []
    for name, dtype in WINDOW_DTYPES.items():
        parameter = torch.nn.Parameter(torch.zeros(dim, device=device))
        optimizer = MFAC(
            [parameter], metric="identity", lr=1e-6, num_grads=num_grads, damping=1e-4, window_dtype=dtype
        )
        parameter.grad = torch.randn(dim, device=device)
        optimizer.step()
        # A full window without m steps: independent gradients, and of their Gram matrix the lengths alone.
        saved = optimizer.state_dict()
        state = saved["state"][0]
        for row in state["window"]:
            row.copy_(torch.randn(dim, device=device))
        gram_MM = torch.diag(torch.stack([row.double().square().sum() for row in state["window"]]))
        state["gram"].copy_(gram_MM)
        state["pushed"] = num_grads
        optimizer.load_state_dict(saved)
        del saved, state, row  # the optimizer would copy a window that is held here too
        buffer_MD = optimizer.state[parameter]["window"]
        adamw = torch.optim.AdamW([parameter], lr=1e-9)
        contenders: dict[str, Callable[[], Any]] = {"mfac": optimizer.step, "adamw": adamw.step}
        if dtype == torch.float32 and device.type == "cpu":
            paper = PaperDynamicInverse(1, 1, damping=1e-4)
            paper.grads_MD, paper.gram_MM = buffer_MD, gram_MM.float()
            contenders["paper"] = lambda paper=paper, grad=parameter.grad: paper.step(grad)
        readers = read_kernels(buffer_MD)
        times: dict[str, list[float]] = {key: [] for key in (*contenders, *readers)}
        for _ in range(rounds + 1):
            # A gradient of its own for each round: copies of one in the window would ask for float64 arithmetic.
            parameter.grad.normal_()
            for key, run in (contenders | readers).items():
                times[key].append(seconds(run, device))
        medians = {key: statistics.median(values[1:]) for key, values in times.items()}
        # Bandwidth changes from second to second, so each round has its own floor: twice its fastest read.
        reads = [min(values) for values in zip(*(times[key][1:] for key in readers), strict=True)]
        floor = 2 * statistics.median(reads)
        over_floor = [step / (2 * read) for step, read in zip(times["mfac"][1:], reads, strict=True)]
        rows.append(
            {
                "num_grads": num_grads,
                "dim": dim,
                "window_dtype": name,
                "window_gib": buffer_MD.nbytes / GIB,
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
    """Measure time and peak memory of an epoch of SST-2 at the published m = 1024, and of AdamW; a process each."""
    contenders = {
        "adamw": ["--optim_name", "adamw"],
        "mfac_float32": ["--optim_name", "mfac", "--metric", "identity", "--num_grads", "1024", "--damping", "1e-6"],
        "mfac_bfloat16": [
            "--optim_name",
            "mfac",
            "--metric",
            "identity",
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
            subprocess.run([sys.executable, str(RUN_GLUE), *common, *flags], check=True, stdout=subprocess.DEVNULL)
            written = json.loads((Path(directory) / "results.json").read_text())
        rows[name] = {"seconds": written["results"]["train_runtime"], "peak_gib": written["peak_memory_gib"]}
        rows[name]["over_adamw"] = rows[name]["seconds"] / rows["adamw"]["seconds"]
    print_table(
        "an epoch of SST-2, BERT-tiny, batch 32, m = 1024",
        ("optimizer", "seconds", "/ AdamW", "peak GiB of the process"),
        (
            (name, f"{row['seconds']:.0f}", f"{row['over_adamw']:.2f}", f"{row['peak_gib']:.2f}")
            for name, row in rows.items()
        ),
    )
    return rows


def read_kernels(buffer_MD: Tensor) -> dict[str, Callable[[], Any]]:
    """Return ways to read the whole window once; the fastest of them sets the floor."""
    words = buffer_MD.view(torch.float32) if buffer_MD.shape[1] % 2 == 0 else buffer_MD
    flat = words.reshape(-1)
    x = torch.ones(words.shape[1], dtype=words.dtype, device=words.device)
    z = torch.ones(words.shape[0], dtype=words.dtype, device=words.device)
    return {"sum": flat.sum, "mv": lambda: torch.mv(words, x), "mv_t": lambda: torch.mv(words.t(), z)}


def print_steps(rows: list[dict[str, Any]]) -> None:
    """Print the step times as a table."""
    print_table(
        "one optimizer step, medians",
        ("d", "m", "window", "GiB", "read GB/s", "floor ms", "MFAC ms", "/ floor", "/ AdamW", "paper / MFAC"),
        (
            (
                f"{row['dim']:,}",
                row["num_grads"],
                row["window_dtype"],
                f"{row['window_gib']:.2f}",
                f"{row['read_gb_per_s']:.1f}",
                f"{row['floor_ms']:.1f}",
                f"{row['mfac_ms']:.1f}",
                f"{row['mfac_over_floor']:.2f}",
                f"{row['mfac_over_adamw']:.1f}",
                "-" if row["paper_over_mfac"] is None else f"{row['paper_over_mfac']:.2f}",
            )
            for row in rows
        ),
    )
