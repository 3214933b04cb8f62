"""A plan of ranks beside what gloo ranks on this machine do: bytes held, bytes handed to collectives, seconds.

Each number of ranks is started anew on the loopback interface. A rank trains a BERT with random weights on random
words: under DistributedDataParallel, or in shards of FSDP2. Its collectives are counted by wrapping those of
`torch.distributed`, those of DistributedDataParallel among them. In every round the ranks first measure, all at once,
what the plan computes with: the pace of both passes over a window of another size, of new memory, and of a broadcast
of that size, the time of a message, and of a step on parameters of a few numbers each. Of all rounds the shortest
times count, on both sides: other programs on the machine only lengthen them.

Computing is timed in seconds of the rank's own thread, which do not count while others have the core, and sending in
seconds of the clock, from a barrier on. So the figures of more ranks than there are cores are those of ranks that wait
for no core while they compute; how long the whole step took by the clock stands beside.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from bench.common import print_table
from mfac_hf import MFAC, Machine, RankPlan, plan_ranks
from mfac_hf.machine import peak_memory
from mfac_hf.ops.metric import metric_move, metric_push

# Hidden size, layers and words of the BERT.
MODELS = {"BERT-tiny": (128, 2, 30_522), "BERT-mini": (256, 4, 30_522), "MiniLM": (384, 6, 30_522)}
# Ranks and shards.
MESHES = [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 4), (4, 2)]
SENTENCES, WORDS = 8, 16
COLLECTIVES = ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor")
COLLECTIVES += ("all_gather_single", "reduce_scatter_single")  # what they are called from torch 2.13 on
M_MMAP_THRESHOLD = -3  # of glibc
SAMPLE_NUMBERS = 1 << 22  # of the arrays by which memory is timed: larger than caches
COUNTED = ("parameters", "gradients", "window", "second_moment")


def make_model(name: str) -> nn.Module:
    """A BERT with a head for two classes, the same on each rank."""
    from transformers import BertConfig, BertForSequenceClassification

    hidden, layers, words = MODELS[name]
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=words,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(2, hidden // 64),
            intermediate_size=4 * hidden,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def benchmark_plan(name: str, rounds: int, meshes: Sequence[tuple[int, int]] = MESHES) -> Iterator[dict[str, Any]]:
    """Start the ranks of each mesh, and compare what they did with the plan.

    Yields:
        A row for each mesh: planned and measured bytes of the rank that holds the most, bytes handed to collectives,
        seconds, and the ratios of planned to measured.
    """
    for ranks, shards in meshes:
        with tempfile.TemporaryDirectory() as directory:
            arguments = (name, ranks, shards, rounds, directory)
            mp.start_processes(_run, arguments, nprocs=ranks, start_method="spawn")  # type: ignore[no-untyped-call]
            measured = [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(ranks)]
        yield _compare(name, ranks, shards, measured)


def _run(rank: int, name: str, ranks: int, shards: int, rounds: int, directory: str) -> None:
    torch.set_num_threads(1)
    # Blocks from 1 MiB on come from the system and go back to it, so that what a step allocates shows. By itself glibc
    # does so from 32 MiB on.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    if "lo" in [interface for _, interface in socket.if_nameindex()]:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous = f"file://{directory}/rendezvous"
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=timedelta(seconds=300)
    )
    try:
        Path(directory, f"{rank}.json").write_text(json.dumps(measure_rank(name, shards, rounds)))
        dist.barrier()
    finally:
        gc.collect()  # optimizers lie in reference cycles and hold the group
        dist.destroy_process_group()


def measure_rank(name: str, shards: int, rounds: int) -> dict[str, Any]:
    """What this rank of the initialized process group holds, hands over and takes."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    model = make_model(name)
    counts: Counter[str] = Counter()
    run: nn.Module = model
    if shards > 1:
        _fully_shard([*model.bert.encoder.layer, model], ranks, shards)
    elif ranks > 1:
        run = nn.parallel.DistributedDataParallel(model)
        run.register_comm_hook(None, allreduce_hook)  # its own all-reduce, through `torch.distributed`
    sharing = dist.group.WORLD if ranks > 1 and shards == 1 else None
    optimizer = MFAC(model.parameters(), lr=1e-6, process_group=sharing)
    paces, times = [], []
    found: dict[str, Any] = {}
    numel = sum(p.numel() for p in model.parameters())
    tiny = _tiny_optimizer(len(list(model.parameters())), sharing, ranks, shards)
    for number in range(rounds + 8):  # the first ones fill the window
        words = torch.randint(30_000, (ranks, SENTENCES, WORDS), generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        counts.clear()
        with counted(counts):
            run(words[rank], labels=torch.arange(SENTENCES) % 2).loss.backward()
        others = dict(counts)
        if number >= 8:
            paces.append(_measure_machine(tiny, numel, ranks)._asdict())
        dist.barrier()
        counts.clear()
        sending = [0.0, 0.0]
        begun, busy = time.perf_counter(), time.thread_time()
        with counted(counts, sending):
            optimizer.step()
        busy = time.thread_time() - busy - sending[1]
        if number >= 8:
            times.append((busy, sending[0], time.perf_counter() - begun))
            found |= {"others": others, "own": dict(counts)}
        found.setdefault("touched", int(words.unique().numel()))
    before = _fresh_peak()
    optimizer.step()
    found["temporary"] = peak_memory() - before
    held = [_local(p) for p in model.parameters()]
    moments = ("second_moment", "moment_steps")
    found["parameters"] = found["gradients"] = sum(p.nbytes for p in held)
    found["window"] = optimizer._window.nbytes if optimizer._window is not None else 0
    found["second_moment"] = sum(
        value.nbytes for state in optimizer.state.values() for key, value in state.items() if key in moments
    )
    return {**found, "paces": paces, "times": times}


def _fully_shard(modules: Sequence[nn.Module], ranks: int, shards: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sizes = (shards,) if ranks == shards else (ranks // shards, shards)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "shards")[-len(sizes) :])
    for module in modules:
        fully_shard(module, mesh=mesh)


@contextlib.contextmanager
def counted(counts: Counter[str], sending: list[float] | None = None) -> Iterator[None]:
    """Add up the bytes that the block hands to collectives: of the whole tensor, where ranks have parts of it.

    Args:
        counts: gets the bytes.
        sending: gets seconds by the clock, from when all ranks are there, and of this thread.
    """
    plain = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counting(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)]
            counts[name] += max(tensor.nbytes for tensor in tensors)
            if sending is None:
                return plain[name](*arguments, **options)
            busy = time.thread_time()
            dist.barrier()
            begun = time.perf_counter()
            result = plain[name](*arguments, **options)
            sending[0] += time.perf_counter() - begun
            sending[1] += time.thread_time() - busy
            return result

        return call

    for name in plain:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


def _fresh_peak() -> int:
    """Forget the peak of this process's memory, and return what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def _tiny_optimizer(tensors: int, sharing: Any, ranks: int, shards: int) -> MFAC:
    """An optimizer of as many parameters, of as many numbers as there are shards."""
    tiny = nn.ParameterList(torch.zeros(shards) for _ in range(tensors))
    if shards > 1:
        _fully_shard([tiny], ranks, shards)
    optimizer = MFAC(tiny.parameters(), lr=1e-6, process_group=sharing)
    for step in range(8):
        _step_tiny(optimizer, step)
    return optimizer


def _step_tiny(optimizer: MFAC, seed: int) -> float:
    """Seconds of this thread in a step."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
            _local(p.grad).normal_(generator=generator)
    busy = [0.0, 0.0]
    with counted(Counter(), busy):
        return _busy(optimizer.step) - busy[1]


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _busy(run: Callable[[], Any]) -> float:
    """Seconds of this thread."""
    begun = time.thread_time()
    run()
    return time.thread_time() - begun


def _measure_machine(tiny: MFAC, numel: int, ranks: int) -> Machine:
    """What a plan computes with, all ranks at it at once."""
    window = torch.ones(8, SAMPLE_NUMBERS, dtype=torch.bfloat16)
    grad, moment, parameter = (torch.ones(SAMPLE_NUMBERS) for _ in range(3))
    weights = torch.ones(8, dtype=torch.float64)

    def passes() -> None:
        metric_push(window, [grad], moment, 0, 8, 0.001, 1e-8)
        metric_move(window, weights, moment, 1e-8, False, [parameter], [1.0], [1e-9])

    block = numel // ranks
    dist.barrier()
    memory = SAMPLE_NUMBERS * (24 + 2 * 8 * 2) / _busy(passes)
    new: list[Tensor] = []
    filled = _busy(lambda: new.extend(torch.empty(block).fill_(1.0) for _ in range(ranks)))
    filled_again = _busy(lambda: [x.fill_(2.0) for x in new])
    fresh = 4 * numel / max(filled - filled_again, 1e-9)
    network, latency = 1e12, 0.0
    if ranks > 1:
        number, own = torch.zeros(8, dtype=torch.float64), torch.ones(block)
        dist.barrier()
        begun = time.perf_counter()
        for _ in range(8):
            dist.all_reduce(number)
        latency = (time.perf_counter() - begun) / 8 / (2 * (ranks - 1))
        dist.barrier()
        begun = time.perf_counter()
        new = [own if root == dist.get_rank() else torch.empty(block) for root in range(ranks)]
        for root, block_N in enumerate(new):
            dist.broadcast(block_N, src=root)
        network = 4 * numel / (time.perf_counter() - begun)
    dist.barrier()
    return Machine(
        memory=0.0,
        memory_bandwidth=memory,
        network_bandwidth=network,
        latency=latency,
        flops=1e12,
        step_overhead=_step_tiny(tiny, 99),
        tensor_overhead=0.0,
        fresh_bandwidth=fresh,
        joins_gradients=False,
    )


def _compare(name: str, ranks: int, shards: int, measured: list[dict[str, Any]]) -> dict[str, Any]:
    touched = measured[0]["touched"]
    model = make_model(name)

    def plan(machine: Machine) -> RankPlan:
        return plan_ranks(
            model, ranks=ranks, shards=shards, embedding_rows=touched, machine=machine,
            share_window=None if shards > 1 else ranks > 1,
        )  # fmt: skip

    for each in measured:
        each["paces"] = [Machine(**pace) for pace in each["paces"]]
    fastest = [_fastest(each["paces"]) for each in measured]
    planned = plan(fastest[0])
    compute = max(plan(pace).work[rank].seconds(pace) for rank, pace in enumerate(fastest))
    network = max(plan(pace).network_seconds() for pace in fastest)
    rounds = list(zip(*(each["times"] for each in measured), strict=True))
    busy, sent, clock = (min(max(time[i] for time in times) for times in rounds) for i in range(3))
    bytes_held = {
        key: {
            "planned": max(getattr(holding, key) for holding in planned.holdings),
            "measured": max(each[key] for each in measured),
        }
        for key in (*COUNTED, "temporary")
    }
    payload = {
        by: sum(c.payload for c in planned.collectives if (c.by == "MFAC") == (by == "own"))
        for by in ("own", "others")
    }
    return {
        "model": name,
        "ranks": ranks,
        "shards": shards,
        "cores": os.cpu_count(),
        "touched_rows": touched,
        "bytes_held": bytes_held,
        "bytes_of_collectives": {
            by: {"planned": payload[by], "measured": max(sum(each[by].values()) for each in measured)}
            for by in payload
        },
        "seconds": {
            "computing": _pair(compute, busy),
            "sending": _pair(network, sent),
            "step": _pair(compute + network, busy + sent),
            "by_the_clock": clock,
        },
    }


def _fastest(paces: Sequence[Machine]) -> Machine:
    """The best of each speed."""
    best = {
        name: (max if name.endswith("bandwidth") else min)(getattr(pace, name) for pace in paces)
        for name in ("memory_bandwidth", "fresh_bandwidth", "network_bandwidth", "latency", "step_overhead")
    }
    return paces[0]._replace(**best)


def _pair(planned: float, measured: float) -> dict[str, float]:
    return {"planned": planned, "measured": measured, "ratio": planned / measured if measured else 1.0}


def print_plan(rows: list[dict[str, Any]]) -> None:
    """Print planned beside measured as a table."""

    def cell(pair: dict[str, float], unit: float = 1 << 20) -> str:
        planned, measured = pair["planned"], pair["measured"]
        ratio = f" ({planned / measured:.2f})" if measured else ""
        return f"{planned / unit:.1f} / {measured / unit:.1f}{ratio}"

    def times(pair: dict[str, float]) -> str:
        return f"{1e3 * pair['planned']:.1f} / {1e3 * pair['measured']:.1f} ({pair['ratio']:.2f})"

    print_table(
        "planned / measured (ratio): MiB of the rank that holds the most, MiB handed to collectives, ms of a step",
        ("model", "ranks", "shards", "window", "second moments", "allocated in a step", "MFAC's messages",
         "DDP's or FSDP2's", "computing", "sending", "step"),
        (
            (
                row["model"], row["ranks"], row["shards"],
                *(cell(row["bytes_held"][key]) for key in ("window", "second_moment", "temporary")),
                *(cell(row["bytes_of_collectives"][key]) for key in ("own", "others")),
                *(times(row["seconds"][key]) for key in ("computing", "sending", "step")),
            )
            for row in rows
        ),
    )  # fmt: skip
