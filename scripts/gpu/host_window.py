"""A window in host memory that the device streams: right, repeatable, and with transfers beside computing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from bench.common import GB, print_table, seconds
from torch import Tensor, nn

from gpu.part import Context, require
from mfac_hf import MFAC
from mfac_hf.fisher import dense, streaming
from mfac_hf.fisher.dense import DenseColumns
from mfac_hf.fisher.streaming import Stream

ROWS, REPEATS, ROUNDS = 8, 8, 5
COLUMNS = {"cuda": 100_000_001, "cpu": 100_001}  # the last portion is short, and its rows are not aligned


def stream_from_host(context: Context) -> dict[str, Any]:
    """Passes over a window in host memory beside those over one on the device, steps of both, and times."""
    if context.rehearsal:
        from tests.helpers.lanes import DisorderedLane

        streaming.PORTION_BYTES = 1 << 19
        streaming.make_lane = dense.make_lane = lambda device: DisorderedLane("late")
    device = torch.device("cpu", 0) if context.rehearsal else torch.device("cuda", torch.cuda.current_device())
    results = {
        str(dtype).removeprefix("torch."): check_passes(device, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    results["steps"] = {metric: check_steps(context, metric) for metric in ("adam", "identity")}
    results["times"] = measure_overlap(device, context.rehearsal)
    return results


def make_stores(device: torch.device, dtype: torch.dtype) -> tuple[DenseColumns, DenseColumns]:
    """The same numbers in host memory and on the device."""
    dim = COLUMNS[device.type]
    whole = DenseColumns(ROWS, dim, dtype=dtype, device=device)
    whole.buffer_MD.normal_(generator=torch.Generator(device).manual_seed(0))
    return DenseColumns(ROWS, dim, buffer=whole.buffer_MD.cpu(), compute_device=device), whole


def check_passes(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Both passes, as often as the order of transfers may vary."""
    streamed, whole = make_stores(device, dtype)
    weights_M = torch.linspace(-1, 1, ROWS, dtype=torch.float64, device=device)
    expected_D, dots_M = whole.combine(weights_M), whole.dots(3, ROWS)
    first_M = streamed.dots(3, ROWS)
    off = float((first_M - dots_M).norm() / dots_M.norm())
    require(off < 1e-6, f"{dtype}: dot products of portions differ by {off:.1e} from those of the whole")
    for repeat in range(REPEATS):
        require(torch.equal(streamed.dots(3, ROWS), first_M), f"{dtype}: dot products changed in repeat {repeat}")
        found_D = streamed.combine(weights_M)
        far = float((found_D - expected_D).abs().max() / expected_D.abs().max())
        require(far <= 1e-6, f"{dtype}: combinations of portions differ by {far:.1e} in repeat {repeat}")
    equal = torch.equal(found_D, expected_D)
    print(
        f"{dtype}: dot products differ by {off:.1e}, combinations {'have the same bits' if equal else f'by {far:.1e}'}"
    )
    return {"dots_off": off, "combine_equal_bits": equal, "combine_off": far}


def check_steps(context: Context, metric: str) -> float:
    """Steps with the window in host memory beside those with it on the device: the share that they differ by."""
    torch.manual_seed(0)
    sizes = [(300, 1000), (7,), (1000, 300 if context.rehearsal else 9000)]
    ours = [nn.Parameter(torch.randn(shape, device=context.device)) for shape in sizes]
    theirs = copy.deepcopy(ours)
    pair = [
        (own, MFAC(own, metric=metric, num_grads=4, damping=0.3, window_device=place, process_group=None))
        for own, place in ((ours, "host"), (theirs, None))
    ]
    begun = [p.detach().clone() for p in ours]  # where both begin
    for step in range(10):
        for own, optimizer in pair:
            generator = torch.Generator(context.device).manual_seed(step)
            for p in own:
                p.grad = torch.randn(p.shape, generator=generator, device=p.device)
            optimizer.step()
    store = pair[0][1]._window.columns[0]
    require(store.device.type == "cpu" and store.compute_device == ours[0].device, f"the window is on {store.device}")
    way = sum(float((p - q).detach().norm()) for p, q in zip(begun, theirs, strict=True))
    off = sum(float((p - q).detach().norm()) for p, q in zip(ours, theirs, strict=True)) / way
    require(off < 1e-5, f"{metric}: steps from host memory differ by {off:.1e} of the way")
    return off


def measure_overlap(device: torch.device, rehearsal: bool) -> dict[str, float]:
    """Seconds of a pass, and of its three parts one after the other."""
    streamed, whole = make_stores(device, torch.bfloat16)
    weights_M = torch.ones(ROWS, dtype=torch.float64, device=device)
    stream = streamed._stream
    assert isinstance(stream, Stream)
    size = ROWS * stream.columns
    host, target = stream.lane.pinned((size,), torch.bfloat16), torch.empty(size, dtype=torch.bfloat16, device=device)
    portions = streamed.dim / stream.columns

    def copy_rows() -> None:
        portion_MC = streamed.buffer_MD[:, : stream.columns]
        host[: portion_MC.numel()].view(ROWS, -1).copy_(portion_MC)

    def send() -> Tensor:
        return target.copy_(host, non_blocking=True)

    parts = {
        "gathering": (copy_rows, portions),
        "sending": (send, portions),
        "computing": (lambda: whole.combine(weights_M), 1.0),
        "pass": (lambda: streamed.combine(weights_M), 1.0),
    }
    found = {name: min(seconds(run, device) for _ in range(ROUNDS)) * times for name, (run, times) in parts.items()}
    found["over_sum"] = found["pass"] / (found["gathering"] + found["sending"] + found["computing"])
    found["gb_per_s"] = streamed.nbytes / found["pass"] / GB
    print_table(
        f"a pass over {streamed.nbytes >> 20} MiB in host memory, and its parts one after the other, ms",
        ("gathering", "sending", "computing", "pass", "pass / sum", "GB/s"),
        [
            (*(f"{1e3 * found[name]:.2f}" for name in parts), f"{found['over_sum']:.2f}", f"{found['gb_per_s']:.1f}"),
        ],
    )
    require(rehearsal or found["over_sum"] < 0.95, f"transfers do not run beside computing: {found}")
    return found
