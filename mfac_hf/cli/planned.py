"""The part of `mfac estimate` that plans ranks: its flags, and the plan as text and JSON take it."""

from __future__ import annotations

import argparse
from typing import Any

# Speeds of a machine that flags may set: the unit of each flag, and what it says.
_SPEEDS = {
    "memory_bandwidth": (1e9, "GB/s that a rank reads and writes"),
    "network_bandwidth": (1e9, "GB/s that a rank sends while it receives as many"),
    "latency": (1e-6, "microseconds of a message"),
}


def add_plan_flags(estimate: argparse.ArgumentParser) -> None:
    """Add what a plan of several ranks is asked for by."""
    plan = estimate.add_argument_group("planning ranks")
    plan.add_argument("--ranks", type=int, help="plan so many processes; a plan of 1 is one, too")
    plan.add_argument(
        "--shards",
        type=int,
        help="FSDP2 with so many shards of every parameter; fewer than ranks: HSDP (default: DistributedDataParallel)",
    )
    plan.add_argument(
        "--share_window",
        choices=("True", "False"),
        help="whether ranks share the window under DistributedDataParallel (default: from 16 MiB on)",
    )
    plan.add_argument(
        "--model_dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: the configuration's)",
    )
    plan.add_argument("--machine", help="laptop (default), h100 with NVLink, or h100-infiniband: speeds of a rank")
    for name, (_, help_text) in _SPEEDS.items():
        plan.add_argument(f"--{name}", type=float, help=f"{help_text}, in place of the machine's")


def planned(model: Any, num_grads: int, dtype: Any, arguments: argparse.Namespace) -> Any:
    """The plan that the flags ask for; None without ``--ranks``.

    Raises:
        ValueError: a flag of plans without ``--ranks``, or a value that cannot be.
    """
    from mfac_hf.planner import MACHINES, plan_ranks

    names = ("shards", "share_window", "model_dtype", "machine", *_SPEEDS)
    if arguments.ranks is None:
        if flag := next((name for name in names if getattr(arguments, name) is not None), None):
            raise ValueError(f"--{flag} {getattr(arguments, flag)} needs --ranks, the number of processes to plan")
        return None
    name = arguments.machine or "laptop"
    if name not in MACHINES:
        raise ValueError(f"--machine {name}: expected one of {', '.join(MACHINES)}")
    given = {
        key: getattr(arguments, key) * unit
        for key, (unit, _) in _SPEEDS.items()
        if getattr(arguments, key) is not None
    }
    return plan_ranks(
        model,
        num_grads,
        dtype,
        metric=arguments.metric,
        embedding_rows=arguments.embedding_rows,
        ranks=arguments.ranks,
        shards=1 if arguments.shards is None else arguments.shards,
        share_window=None if arguments.share_window is None else arguments.share_window == "True",
        machine=MACHINES[name]._replace(**given),
    )


def weights_dtype(model: Any, arguments: argparse.Namespace) -> Any:
    """The type of a model's weights: the flag's, or that in which `from_pretrained` loads them."""
    import torch

    if arguments.model_dtype is not None:
        return getattr(torch, arguments.model_dtype)
    dtype = getattr(model.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def describe_plan(plan: Any) -> dict[str, Any]:
    """A plan as JSON takes it."""
    return {
        "ranks": plan.ranks,
        "shards": plan.shards,
        "shares_window": plan.shares_window,
        "fits": plan.fits,
        "machine": plan.machine._asdict(),
        "bytes_held": [{**holding._asdict(), "total": holding.total} for holding in plan.holdings],
        "collectives": [{**each._asdict(), "sent": each.sent} for each in plan.collectives],
        "work": [work._asdict() for work in plan.work],
        "compute_seconds": plan.compute_seconds,
        "network_seconds": plan.network_seconds(),
        "step_seconds": plan.step_seconds,
    }
