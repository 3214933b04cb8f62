"""Benchmarks, as ratios measured side by side: ``python scripts/benchmark.py --optimizer``.

    python scripts/benchmark.py --accuracy                       # error of the direction against float64, in seconds
    python scripts/benchmark.py --optimizer [--threads N]        # step time over the floor, beside AdamW and the paper
    python scripts/benchmark.py --optimizer --device cuda        # the same on a GPU
    python scripts/benchmark.py --kernels [--device cuda]        # checks and times of the two passes; minutes
    python scripts/benchmark.py --epoch MODEL DATA               # an epoch of SST-2 with the published window
    python scripts/benchmark.py --pruning --threads 1            # the static inverse, blocked and full, beside theirs
    python scripts/benchmark.py --sparse                         # sparse files and inference, BERT-base, beside others

Every round times each contender once, so that all meet the same noise; figures are medians over rounds. Results go
to ``--output`` as JSON, with the command line and the machine. `scripts/bench/` has a module for each subject.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bench import accuracy, kernels, optimizer, pruning, sparse
from bench.common import describe_machine


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmarks that the flags name, print their tables, and return what is written as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--accuracy", action="store_true", help="error of the direction against a dense float64 oracle"
    )
    parser.add_argument("--optimizer", action="store_true", help="time of an optimizer step")
    parser.add_argument(
        "--kernels", action="store_true", help="checks and times of the native kernels (16 GiB of memory on a CPU)"
    )
    parser.add_argument(
        "--epoch",
        nargs=2,
        metavar=("MODEL", "DATA"),
        help="an epoch of SST-2 at m = 1024 beside AdamW, through run_glue.py",
    )
    parser.add_argument(
        "--sparse",
        action="store_true",
        help="sparse files and inference of a random BERT-base, beside the alternatives",
    )
    parser.add_argument(
        "--pruning",
        action="store_true",
        help="the static inverse of ResNet-20, blocked and full, beside the paper's recursions (some 20 minutes)",
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
    if not (args.accuracy or args.optimizer or args.kernels or args.epoch or args.pruning or args.sparse):
        parser.error("nothing to do: pass --accuracy, --optimizer, --kernels, --epoch, --pruning or --sparse")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"command": " ".join(["python", "scripts/benchmark.py", *(argv or sys.argv[1:])])}
    if args.accuracy:
        results["accuracy"] = accuracy.benchmark_accuracy()
    if args.optimizer:
        device = torch.device(args.device)
        results["optimizer"] = [
            row
            for dim in args.dims
            for num_grads in args.num_grads
            for row in optimizer.benchmark_step(num_grads, dim, args.rounds, device)
        ]
        optimizer.print_steps(results["optimizer"])
    if args.kernels:
        device = torch.device(args.device)
        results["kernels"] = kernels.benchmark_kernels(device, kernels.TIMED[device.type], args.rounds)
        kernels.print_kernels(results["kernels"])
    if args.epoch:
        results["epoch"] = optimizer.benchmark_epoch(*args.epoch)
    if args.pruning:
        results["pruning_blocked"] = [
            pruning.benchmark_blocked(num_grads, block_size, args.rounds)
            for num_grads in (64, 1024)
            for block_size in (50, 128)
        ]
        pruning.print_blocked(results["pruning_blocked"])
        results["pruning_full"] = [pruning.benchmark_full(1024, 8, args.rounds)]
        pruning.print_full(results["pruning_full"])
    if args.sparse:
        results["sparse_files"] = sparse.benchmark_sizes(args.rounds)
        sparse.print_sizes(results["sparse_files"])
        results["sparse_inference"] = sparse.benchmark_inference(args.rounds)
        sparse.print_inference(results["sparse_inference"])
    results["machine"] = describe_machine(torch.device(args.device))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
