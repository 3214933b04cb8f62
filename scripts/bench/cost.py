r"""What a step of MFAC in Adam's metric costs: beside AdamW's, and over the bytes that it has to move.

Each of d parameters in float32, with a window of m gradients in b bytes each, takes at least

- 4 bytes to read the gradient, 8 to read and write the second moment, and b to write the scaled gradient into its row,
- (m - 1) b to read the other rows for the dot products,
- m b to read the window for the direction, 4 to read the second moment that scales it, and 8 to read and write the
  parameter:

.. math:: \text{bytes} = d\,(24 + 2 m b), \qquad \text{AdamW's: } 28\,d,

since AdamW reads the gradient, and reads and writes two moments and the parameter. The floor is the time for these
bytes at the pace of the fastest way to read the window in the same round. A row that is written costs the processor a
read too, unless it goes past the caches: the floor does not count that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import GB, print_table, seconds
from bench.optimizer import WINDOW_DTYPES, read_kernels
from mfac_hf import MFAC


def bert_shapes(hidden: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a BERT without its head; no table of words where ``vocabulary`` is 0."""
    tables = [(vocabulary, hidden), (512, hidden), (2, hidden)] if vocabulary else []
    norm, square = [(hidden,), (hidden,)], [(hidden, hidden), (hidden,)]
    up, down = [(4 * hidden, hidden), (4 * hidden,)], [(hidden, 4 * hidden), (hidden,)]
    return [*tables, *norm, *(4 * square + up + down + 2 * norm) * layers, *square]


def lora_shapes(hidden: int, layers: int, values: int, rank: int) -> list[tuple[int, ...]]:
    """Shapes of LoRA's factors for the queries and values of a decoder."""
    return [(rank, hidden), (hidden, rank), (rank, hidden), (values, rank)] * layers


MODELS = {
    "0.4M": bert_shapes(128, 2, 0),  # BERT-tiny without its tables
    "4.4M": bert_shapes(128, 2, 30_522),  # BERT-tiny
    "23M": bert_shapes(384, 6, 30_522),  # MiniLM
    "110M": bert_shapes(768, 12, 30_522),  # BERT-base
    "lora-1B": lora_shapes(2048, 16, 512, 16),  # Llama 3.2 1B
}


ADAMW_BYTES = 28  # a parameter


def bytes_moved(dim: int, num_grads: int, itemsize: int) -> int:
    """Bytes that a step in Adam's metric has to move: see the head of this file."""
    return dim * (24 + 2 * num_grads * itemsize)


def benchmark_cost(name: str, num_grads: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Time steps of MFAC with a full window, of fused AdamW and of foreach AdamW, on parameters of one of `MODELS`.

    With one thread of a CPU the times are those of the process, which other programs on the machine disturb less.

    Returns:
        A row for each type of the window: medians over rounds, and of ratios within each round.
    """
    parameters = [nn.Parameter(torch.zeros(shape, device=device)) for shape in MODELS[name]]
    dim = sum(p.numel() for p in parameters)
    return [_time_round(name, parameters, num_grads, dtype, rounds, device) | {"dim": dim} for dtype in WINDOW_DTYPES]


def _time_round(
    name: str, parameters: list[nn.Parameter], num_grads: int, dtype: str, rounds: int, device: torch.device
) -> dict[str, Any]:
    dim = sum(p.numel() for p in parameters)
    mfac = MFAC(
        parameters, lr=1e-9, metric="adam", num_grads=num_grads, window_dtype=WINDOW_DTYPES[dtype], row_sparse=False
    )
    for _ in range(num_grads):
        _renew_gradients(parameters)
        mfac.step()
    window_MD = _window(mfac, num_grads)
    contenders = {
        "mfac": mfac.step,
        "fused": torch.optim.AdamW(parameters, lr=1e-9, fused=True).step,
        "foreach": torch.optim.AdamW(parameters, lr=1e-9, foreach=True).step,
    }
    readers = read_kernels(window_MD)
    times: dict[str, list[float]] = {key: [] for key in (*contenders, *readers)}
    for number in range(rounds + 1):
        _renew_gradients(parameters)
        for key, run in (contenders | readers).items():
            spent = _spent(run, device)
            if number:  # the first round warms up
                times[key].append(spent)
    paces = [window_MD.nbytes / min(reads) for reads in zip(*(times[key] for key in readers), strict=True)]
    least = bytes_moved(dim, num_grads, window_MD.element_size())
    medians = {key: 1e3 * statistics.median(times[key]) for key in contenders}
    ratio = {key: _median_ratio(times["mfac"], times[key]) for key in ("fused", "foreach")}
    floors = [least / pace for pace in paces]
    return {
        "model": name,
        "num_grads": num_grads,
        "window_dtype": dtype,
        "bytes_per_parameter": 4 + window_MD.nbytes / dim,
        "read_gb_per_s": statistics.median(paces) / GB,
        "floor_ms": 1e3 * statistics.median(floors),
        "mfac_ms": medians["mfac"],
        "mfac_over_floor": _median_ratio(times["mfac"], floors),
        "adamw_fused_ms": medians["fused"],
        "adamw_foreach_ms": medians["foreach"],
        "adamw_over_floor": _median_ratio(times["fused"], [ADAMW_BYTES * dim / pace for pace in paces]),
        "mfac_over_fused": ratio["fused"],
        "mfac_over_foreach": ratio["foreach"],
    }


def _renew_gradients(parameters: list[nn.Parameter]) -> None:
    """Draw gradients of their own for each step: copies of one would ask for float64 arithmetic."""
    for p in parameters:
        p.grad = torch.randn_like(p) if p.grad is None else p.grad.normal_()


def _window(optimizer: MFAC, num_grads: int) -> Tensor:
    """The memory of the whole window, (m, d): the state has a view for each parameter."""
    view = next(state["window"] for state in optimizer.state.values())
    flat = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    return flat.view(num_grads, -1)


def _spent(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cpu" or torch.get_num_threads() > 1:
        return seconds(run, device)
    begun = time.process_time()
    run()
    return time.process_time() - begun


def _median_ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(ours, others, strict=True))


def print_cost(rows: list[dict[str, Any]]) -> None:
    """Print the costs as a table."""
    columns = {
        "model": ("model", "{}"),
        "m": ("num_grads", "{}"),
        "window": ("window_dtype", "{}"),
        "state B / parameter": ("bytes_per_parameter", "{:.0f}"),
        "read GB/s": ("read_gb_per_s", "{:.1f}"),
        "floor ms": ("floor_ms", "{:.2f}"),
        "MFAC ms": ("mfac_ms", "{:.2f}"),
        "/ floor": ("mfac_over_floor", "{:.2f}"),
        "fused AdamW ms": ("adamw_fused_ms", "{:.2f}"),
        "foreach": ("adamw_foreach_ms", "{:.2f}"),
        "fused / its floor": ("adamw_over_floor", "{:.2f}"),
        "MFAC / fused": ("mfac_over_fused", "{:.2f}"),
        "MFAC / foreach": ("mfac_over_foreach", "{:.2f}"),
    }
    print_table(
        "one step in Adam's metric beside AdamW's, medians",
        list(columns),
        ([form.format(row[key]) for key, form in columns.values()] for row in rows),
    )
