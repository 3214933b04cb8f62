"""Solves with the empirical Fisher in its three forms, the paper's recursions, and the operators by themselves."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from mfac_hf import memory_estimate
from mfac_hf.fisher import BlockedFisher, FullFisher, GradientWindow
from mfac_hf.fisher.reference import PaperDynamicInverse
from scenarios.common import identity, tiny_bert

__all__ = ["blocked", "full", "memory", "operators", "window"]

DIM = 3001


def _draw(count: int, dim: int = DIM, seed: int = 3) -> torch.Tensor:
    """Gradients with a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(count, 8, generator=generator) @ torch.randn(8, dim, generator=generator)
    return 0.1 * strong + 0.1 * torch.randn(count, dim, generator=generator)


def window(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """Directions of a window that fills and turns over, and of one with equal rows."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for normalize in ("num_grads", "count"):
            fisher = GradientWindow(16, DIM, damping=1e-4, dtype=dtype, normalize=normalize)
            directions = []
            for grad in _draw(24):
                fisher.push(grad)
                directions.append(fisher.direction())
            fisher.push(grad)
            fisher.push(grad)
            found[f"{dtype} {normalize}"] = [*directions, fisher.direction(), fisher.solve(_draw(1, seed=4)[0])]
    paper = PaperDynamicInverse(16, DIM, damping=1e-4)
    return found | {"paper": [paper.step(grad) for grad in _draw(24)]}


def blocked(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """Both forms, streamed in pieces of several sizes, with a damping that changes."""
    found = {}
    for block_size in (16, 100, 600):
        for count in (40, 200):
            for dtype in (torch.float32, torch.float64):
                fisher = BlockedFisher(DIM, block_size=block_size, damping=1e-3, num_grads=count, dtype=dtype)
                for piece in _draw(count).to(dtype).split((1, 4, 1, count - 6)):
                    fisher.add(piece)
                x = _draw(1, seed=4)[0].to(dtype)
                results = [fisher.inverse_diagonal(), fisher.solve(x)]
                fisher.damping = 1e-5
                found[f"{block_size} {count} {dtype}"] = [*results, fisher.inverse_diagonal(), fisher.solve(x)]
    return found


def full(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """The inverse without blocks, whole and in pages."""
    found = {}
    for pages in (None, 4096):
        fisher = FullFisher(_draw(24, 9001), damping=1e-4, page_size=pages)
        found[f"pages of {pages}"] = [fisher.inverse_diagonal(), fisher.solve(_draw(1, 9001, seed=4)[0])]
    return found


def operators(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """Each of ``torch.ops.mfac`` that the library has registered, native where a compiler is there."""
    importlib.import_module("mfac_hf.pruning.trace")  # defines the operator that only pruning uses

    GradientWindow(1, 1, damping=1.0).push(torch.ones(1))  # loads the native kernels
    grads, ops = _draw(9), torch.ops.mfac
    weights = torch.linspace(-1, 1, 9, dtype=torch.float64)
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for other in (torch.float32, torch.float64):
            x = _draw(1, seed=4)[0].to(other)
            stored = grads.to(dtype)
            found[f"window {dtype} {other}"] = [ops.row_dots(stored, x), ops.combine(stored, weights, x, 0.5, 2.0)]
    wide = _draw(200, 48).double().T.contiguous()
    matrices = torch.stack([wide[i : i + 12] @ wide[i : i + 12].T + torch.eye(12) for i in range(0, 36, 12)])
    right = torch.linspace(-1, 1, 36, dtype=torch.float64).view(3, 12)
    sums = torch.zeros(3, 78, dtype=torch.float64)
    ops.add_gram(sums, _draw(20, 36), 12)
    found["blocks"] = [
        sums,
        ops.unpack_gram(sums, 12, 20, 1e-3),
        *ops.spd_inverse(matrices),
        *ops.spd_solve(matrices, right),
    ]
    rows = torch.tensor([[0, 2, 5], [1, 3, 7], [2, 5, 7]])
    place = torch.tensor([0, -1, 1, -1, -1, 2, -1, -1])
    values, table = _draw(9, 33).view(3, 3, 33), _draw(3, 33, seed=4)
    found["rows"] = [
        ops.sparse_dots(rows, values, place, table),
        ops.sparse_combine(rows, values, place, right[0, :3], 3),
    ]
    lower = matrices[0].tril() / 10
    found["coefficients"] = [ops.unit_lower_inverse(lower), ops.lower_product(lower, right[0], True)]
    inverses = ops.spd_inverse(matrices)[0].float()
    found["trace"] = ops.greedy_trace(inverses, right.float(), right.float().abs() > 0.1)
    return found


def memory(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """What a window is said to take."""
    options: Any = identity(memory_estimate)
    return {
        "bert": memory_estimate(tiny_bert(), 1024, **options),
        "number": memory_estimate(10**9, 64, torch.bfloat16, **options),
    }
