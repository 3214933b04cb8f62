"""`mfac estimate` prints the memory that the gradient window of a model takes, and its time in each step.

    mfac estimate google/bert_uncased_L-2_H-128_A-2 --num_grads 1024 --dtype bfloat16
    mfac estimate 4400000 --num_grads 512

It reads the configuration of the model and downloads no weights. The time is that of the two passes over the window,
at the pace that this machine shows on a small window of the same dtype, and of factoring an m x m matrix.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mfac_hf.cli.errors import as_command_error
from mfac_hf.defaults import MFAC_NUM_GRADS, TOUCHED_EMBEDDING_ROWS

SAMPLE_BYTES = 128 << 20  # larger than the caches
ROUNDS = 5


def add_parser(commands: Any) -> None:
    """Add `mfac estimate` to the sub-commands."""
    estimate = commands.add_parser(
        "estimate",
        help="print memory and time of the optimizer for a model",
        description="Print the memory of a model's gradient window, and its time in each step on this machine.",
    )
    estimate.add_argument(
        "model", help="directory or Hub name of a model (config.json is read), or a number of parameters"
    )
    estimate.add_argument(
        "--num_grads",
        type=int,
        default=MFAC_NUM_GRADS,
        help=f"number of gradients in the window, m (default: {MFAC_NUM_GRADS})",
    )
    estimate.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float64"),
        default="float32",
        help="dtype of the window (default: float32)",
    )
    estimate.add_argument(
        "--embedding_rows",
        type=int,
        default=TOUCHED_EMBEDDING_ROWS,
        help=f"rows of an embedding table that one batch looks up (default: {TOUCHED_EMBEDDING_ROWS})",
    )
    estimate.add_argument("--no_time", action="store_true", help="do not measure the time on this machine")
    estimate.add_argument("--json", action="store_true", help="print JSON in place of text")
    estimate.set_defaults(run=_run_estimate)


def _run_estimate(arguments: argparse.Namespace) -> None:
    import torch

    from mfac_hf.machine import GIB, available_bytes
    from mfac_hf.memory import memory_estimate

    with as_command_error():
        model = int(arguments.model) if arguments.model.isdecimal() else _skeleton(arguments.model)
        dtype = getattr(torch, arguments.dtype)
        memory = memory_estimate(model, arguments.num_grads, dtype, embedding_rows=arguments.embedding_rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = available_bytes(device)
    report: dict[str, Any] = {"bytes": memory.bytes, "device": str(device), "free_bytes": free, "step_seconds": None}
    if not arguments.no_time:
        report["step_seconds"] = _step_seconds(memory.bytes, arguments.num_grads, dtype, device)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    print(memory.breakdown)
    verdict = "fits" if memory.bytes <= free else "does NOT fit"
    print(f"{verdict}: {free / GIB:.2f} GiB are free on {device} (the model and its training come on top)")
    if report["step_seconds"] is not None:
        print(f"about {1000 * report['step_seconds']:.0f} ms in each step on top of forward and backward, window full")


def _skeleton(name: str) -> Any:
    """Build the model from its configuration, without weights."""
    import torch
    import transformers

    path = Path(name)
    source = path / "config.json" if path.is_dir() else name
    config = transformers.AutoConfig.from_pretrained(source)
    kind = getattr(transformers, str((config.architectures or [""])[0]), None)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config) if kind is None else kind(config)


def _step_seconds(window_bytes: int, num_grads: int, dtype: Any, device: Any) -> float:
    """Seconds of two passes over the window at the pace of this machine, and of the factorization."""
    import torch
    from torch.utils.benchmark import Timer

    from mfac_hf.ops.window import combine, row_dots

    rows = min(num_grads, 64)
    columns = SAMPLE_BYTES // (rows * dtype.itemsize)
    window_MD = torch.ones(rows, columns, dtype=dtype, device=device)
    x_D = torch.ones(columns, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    weights_M = torch.ones(rows, dtype=torch.float64, device=device)
    gram_MM = torch.eye(num_grads, dtype=torch.float64, device=device)
    scope = {
        "dots": row_dots,
        "combine": combine,
        "torch": torch,
        "g": window_MD,
        "x": x_D,
        "w": weights_M,
        "k": gram_MM,
    }
    threads = torch.get_num_threads()
    passes = Timer("dots(g, x); combine(g, w)", globals=scope, num_threads=threads).timeit(ROUNDS).median
    factor = Timer("torch.linalg.cholesky_ex(k)", globals=scope, num_threads=threads).timeit(ROUNDS).median
    return passes * window_bytes / (window_MD.numel() * dtype.itemsize) + factor
