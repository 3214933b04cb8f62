"""The static inverse, in blocks and full, beside the paper's recursions: time and memory.

Times cover what a pruning step needs: the inverse from gradients that are there, its diagonal, and one product. Blocks
are cut from the tensors of ResNet-20 as the pruner cuts them, never across tensors. Peak memory is measured in a
process of its own, to which gradients come one at a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.common import in_child, print_table, seconds
from mfac_hf.fisher import BlockedFisher, FullFisher
from mfac_hf.fisher.reference import PaperBlockedInverse, PaperSwapInverse
from mfac_hf.machine import GIB, peak_memory
from mfac_hf.models import create_model

DAMPING = 1e-4

# Rounds with the paper's recursion: at m = 1024 it takes minutes, and so long a time varies little.
PAPER_ROUNDS = 1


def tensor_sizes() -> list[int]:
    """Return the numbers of weights of ResNet-20's convolutions and classifier, 270,896 together."""
    return [p.numel() for p in create_model("resnet20", num_classes=10).parameters() if p.ndim > 1]


def draw_gradients(num_grads: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw gradients of about the size of per-sample ones: a few strong directions and noise; (num_grads, size)."""
    strong = torch.randn(num_grads, 16, generator=generator) @ torch.randn(16, size, generator=generator)
    return 0.01 * strong + 0.01 * torch.randn(num_grads, size, generator=generator)


def benchmark_blocked(num_grads: int, block_size: int, rounds: int, sizes: list[int] | None = None) -> dict[str, Any]:
    """Time the blocked inverses of all tensors, ours beside the paper's recursion, in the same rounds."""
    sizes = tensor_sizes() if sizes is None else sizes
    generator = torch.Generator().manual_seed(0)
    tensors = [draw_gradients(num_grads, size, generator) for size in sizes]
    vectors = [torch.randn(size, generator=generator) for size in sizes]

    def ours() -> None:
        for grads_MD, x_D in zip(tensors, vectors, strict=True):
            fisher = BlockedFisher(len(x_D), block_size=block_size, damping=DAMPING, num_grads=num_grads)
            fisher.add(grads_MD)
            fisher.inverse_diagonal()
            fisher.solve(x_D)

    def paper() -> None:
        for grads_MD, x_D in zip(tensors, vectors, strict=True):
            inverse = PaperBlockedInverse(grads_MD, block_size, damping=DAMPING)
            inverse.inverse_diagonal()
            inverse.solve(x_D)

    row: dict[str, Any] = {"num_grads": num_grads, "block_size": block_size, "dim": sum(sizes)}
    row |= _race(ours, paper, rounds)
    row["ours_peak_gib"] = in_child(_blocked_peak, num_grads, block_size, sizes)
    row["gradients_gib"] = num_grads * sum(sizes) * 4 / GIB
    return row


def benchmark_full(num_grads: int, pages: int, rounds: int, sizes: list[int] | None = None) -> dict[str, Any]:
    """Time the full inverse in pages of columns, beside the paper's in as many pages of rows."""
    sizes = tensor_sizes() if sizes is None else sizes
    generator = torch.Generator().manual_seed(0)
    grads_MD = draw_gradients(num_grads, sum(sizes), generator)
    x_D = torch.randn(sum(sizes), generator=generator)

    def ours() -> None:
        fisher = FullFisher(grads_MD, damping=DAMPING, page_size=-(-sum(sizes) // pages))
        fisher.inverse_diagonal()
        fisher.solve(x_D)

    def paper() -> None:
        inverse = PaperSwapInverse(grads_MD, damping=DAMPING, pages=pages)
        inverse.inverse_diagonal()
        inverse.solve(x_D)

    row: dict[str, Any] = {"num_grads": num_grads, "pages": pages, "dim": sum(sizes)}
    row |= _race(ours, paper, rounds)
    row["ours_extra_gib"] = in_child(_full_peak, num_grads, pages, sizes)
    row["gradients_gib"] = grads_MD.nbytes / GIB
    return row


def _race(ours: Callable[[], None], paper: Callable[[], None], rounds: int) -> dict[str, Any]:
    """Return median times: after one call to warm up, each contender runs once in every round."""
    cpu = torch.device("cpu")
    ours()
    times: dict[str, list[float]] = {"ours": [], "paper": []}
    for i in range(rounds):
        times["ours"].append(seconds(ours, cpu))
        if i < PAPER_ROUNDS:
            times["paper"].append(seconds(paper, cpu))
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {
        "ours_seconds": medians["ours"],
        "paper_seconds": medians["paper"],
        "paper_over_ours": medians["paper"] / medians["ours"],
        "rounds": {key: len(values) for key, values in times.items()},
    }


def _blocked_peak(num_grads: int, block_size: int, sizes: list[int]) -> float:
    """Return the GiB above an idle process for the inverses of all tensors at once, their diagonals and products."""
    generator = torch.Generator().manual_seed(0)
    x_parts = [torch.randn(size, generator=generator) for size in sizes]
    torch.linalg.cholesky_ex(torch.eye(256, dtype=torch.float64))  # before measuring: libraries allocate at first use
    before = peak_memory()
    fishers = [BlockedFisher(size, block_size=block_size, damping=DAMPING, num_grads=num_grads) for size in sizes]
    for _ in range(num_grads):
        for fisher in fishers:
            fisher.add(draw_gradients(1, fisher.dim, generator)[0])
    for fisher, x_D in zip(fishers, x_parts, strict=True):
        fisher.inverse_diagonal()
        fisher.solve(x_D)
    return (peak_memory() - before) / GIB


def _full_peak(num_grads: int, pages: int, sizes: list[int]) -> float:
    """Return the GiB above the gradients themselves."""
    generator = torch.Generator().manual_seed(0)
    grads_MD = torch.empty(num_grads, sum(sizes))
    for row_D in grads_MD:  # one at a time: drawing all at once would be the peak
        row_D.copy_(draw_gradients(1, sum(sizes), generator)[0])
    before = peak_memory()
    fisher = FullFisher(grads_MD, damping=DAMPING, page_size=-(-sum(sizes) // pages))
    fisher.inverse_diagonal()
    fisher.solve(grads_MD[0])
    return (peak_memory() - before) / GIB


def print_blocked(rows: list[dict[str, Any]]) -> None:
    """Print the blocked inverses as a table."""
    print_table(
        "blocked inverse of ResNet-20: build, diagonal and one product",
        ("m", "B", "ours s", "paper s", "paper / ours", "ours peak GiB", "m * d floats GiB"),
        [(row["num_grads"], row["block_size"], *_figures(row, "ours_peak_gib")) for row in rows],
    )


def print_full(rows: list[dict[str, Any]]) -> None:
    """Print the full inverses as a table."""
    print_table(
        "full inverse of ResNet-20: build, diagonal and one product",
        ("m", "pages", "ours s", "paper s", "paper / ours", "ours GiB over gradients", "gradients GiB"),
        [(row["num_grads"], row["pages"], *_figures(row, "ours_extra_gib")) for row in rows],
    )


def _figures(row: dict[str, Any], memory: str) -> Iterator[str]:
    yield f"{row['ours_seconds']:.3f}"
    yield f"{row['paper_seconds']:.3f}"
    yield f"{row['paper_over_ours']:.1f}"
    yield f"{row[memory]:.2f}"
    yield f"{row['gradients_gib']:.2f}"
