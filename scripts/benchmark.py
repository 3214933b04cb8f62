"""Run benchmarks that time contenders side by side: ``python scripts/benchmark.py --optimizer``.

    python scripts/benchmark.py --accuracy                       # error of the direction against float64, in seconds
    python scripts/benchmark.py --optimizer [--threads N]        # step time over the floor, beside AdamW and the paper
    python scripts/benchmark.py --optimizer --device cuda        # the same on a GPU
    python scripts/benchmark.py --cost [--models 4.4M]           # a step in Adam's metric, beside AdamW's two forms
    python scripts/benchmark.py --kernels [--device cuda]        # checks and times of the two passes; minutes
    python scripts/benchmark.py --epoch MODEL DATA               # an epoch of SST-2 with the published window
    python scripts/benchmark.py --pruning --threads 1            # static inverse, blocked and full, beside the paper's
    python scripts/benchmark.py --decoder SmolLM-135M            # one-shot pruning of a decoder: time and memory
    python scripts/benchmark.py --plan BERT-mini                 # a plan of ranks beside 1 to 4 that do it; minutes
    python scripts/benchmark.py --plan_table                     # the plans of docs/several-devices.md
    python scripts/benchmark.py --sparse                         # sparse files and inference, BERT-base, beside others
    python scripts/benchmark.py --served PRUNED --threads 1      # a model of `mfac prune` in each engine

Every round times each contender once, so that all meet the same noise; the tables show medians over rounds, and
ratios. ``--output`` gets the results as JSON, with the command line and the machine. `scripts/bench/` has a module
for each subject.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from bench import accuracy, cost, decoder, engines, kernels, optimizer, plan_table, pruning, ranks, sparse
from bench.common import describe_machine

from mfac_hf.storage import write_json


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in {
        "accuracy": "error of the direction against a dense float64 oracle",
        "optimizer": "time of an optimizer step in the identity metric, with a long window",
        "cost": "time of an optimizer step in Adam's metric, with a short window",
        "kernels": "checks and times of the native kernels (16 GiB of memory on a CPU)",
        "pruning": "static inverse of ResNet-20, blocked and full, beside the paper's recursions (some 20 minutes)",
        "plan_table": "what models take on a laptop, one GPU, eight, and 64, as planned: nothing is measured",
        "sparse": "sparse files and inference of a random BERT-base, beside the alternatives",
    }.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument(
        "--epoch",
        nargs=2,
        metavar=("MODEL", "DATA"),
        help="an epoch of SST-2 at m = 1024 beside AdamW, through run_glue.py",
    )
    parser.add_argument(
        "--plan", choices=ranks.MODELS, help="a plan of ranks beside what 1 to 4 gloo ranks hold, send and take"
    )
    parser.add_argument(
        "--decoder",
        nargs="+",
        choices=decoder.SHAPES,
        help="one-shot pruning of decoders: time, memory beside the model",
    )
    parser.add_argument(
        "--memory_budget", type=float, default=2.0, help="GiB for the Fisher's blocks of --decoder (default: 2)"
    )
    parser.add_argument(
        "--served",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="directories that mfac prune made, in each engine that could serve them",
    )
    parser.add_argument(
        "--num_grads",
        type=int,
        nargs="+",
        help="window lengths m to time (default: 128 512; of --cost 8 16 32, of --decoder 64)",
    )
    parser.add_argument(
        "--models", nargs="+", choices=cost.MODELS, default=["0.4M", "4.4M", "23M"], help="parameters of --cost"
    )
    parser.add_argument(
        "--dims", type=int, nargs="+", default=[300_000, 4_400_000], help="numbers of parameters d to time"
    )
    parser.add_argument("--rounds", type=int, default=7, help="times that each contender is timed (default: 7)")
    parser.add_argument("--threads", type=int, default=None, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--device", default="cpu", help="device of --optimizer and --kernels (default: cpu)")
    parser.add_argument("--output", type=Path, default=None, help="file to write the results to, as JSON")
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmarks that the flags name, print their tables, and return what is written as JSON."""
    parser = make_parser()
    args = parser.parse_args(argv)
    names = ("accuracy", "optimizer", "cost", "kernels", "epoch", "pruning", "decoder")
    names += ("plan", "plan_table", "sparse", "served")
    if not any(getattr(args, name) for name in names):
        parser.error(f"nothing to do: pass one of {', '.join(f'--{name}' for name in names)}")
    if not args.memory_budget > 0:
        parser.error(f"--memory_budget is {args.memory_budget:g}; expected a number of GiB above 0")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    results: dict[str, Any] = {"command": " ".join(["python", "scripts/benchmark.py", *(argv or sys.argv[1:])])}
    if args.accuracy:
        results["accuracy"] = accuracy.benchmark_accuracy()
    if args.optimizer:
        results["optimizer"] = [
            row
            for dim in args.dims
            for num_grads in args.num_grads or (128, 512)
            for row in optimizer.benchmark_step(num_grads, dim, args.rounds, device)
        ]
        optimizer.print_steps(results["optimizer"])
    if args.cost:
        results["cost"] = [
            row
            for name in args.models
            for num_grads in args.num_grads or (8, 16, 32)
            for row in cost.benchmark_cost(name, num_grads, args.rounds, device)
        ]
        cost.print_cost(results["cost"])
    if args.kernels:
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
    if args.decoder:
        results["decoder"] = [
            decoder.benchmark_decoder(name, num_grads, args.memory_budget)
            for name in args.decoder
            for num_grads in args.num_grads or (64,)
        ]
        decoder.print_decoders(results["decoder"])
    if args.plan:
        results["plan"] = list(ranks.benchmark_plan(args.plan, args.rounds))
        ranks.print_plan(results["plan"])
    if args.plan_table:
        results["plan_table"] = plan_table.docs_table()
        print(results["plan_table"], end="")
    if args.sparse:
        results["sparse_files"] = sparse.benchmark_sizes(args.rounds)
        sparse.print_sizes(results["sparse_files"])
        results["sparse_inference"] = sparse.benchmark_inference(args.rounds)
        sparse.print_inference(results["sparse_inference"])
    if args.served:
        results["served"] = [row for path in args.served for row in engines.benchmark_served(path, args.rounds)]
        engines.print_served(results["served"])
    results["machine"] = describe_machine(device)
    if args.output is not None:
        write_json(args.output, results)
    return results


if __name__ == "__main__":
    main()
