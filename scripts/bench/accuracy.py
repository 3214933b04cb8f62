"""The error of the direction against a dense float64 solve."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.common import print_table
from mfac_hf.fisher import GradientWindow
from mfac_hf.fisher.reference import PaperDynamicInverse, dense_fisher


def synthetic_gradients(count: int, dim: int, norm: float, seed: int = 0) -> Iterator[Tensor]:
    """Yield gradients of a given norm: random combinations of 20 directions, plus noise of a third of their size."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(20, dim, generator=generator) / dim**0.5
    for _ in range(count):
        grad = torch.randn(20, generator=generator) @ basis / 20**0.5
        grad += 0.3 * torch.randn(dim, generator=generator) / dim**0.5
        yield grad * (norm / grad.norm())


def benchmark_accuracy(num_grads: int = 256, dim: int = 3000) -> list[dict[str, float]]:
    """Measure the relative error of `F⁻¹ g` for the newest gradient against a dense solve with the stored rows."""
    rows = []
    for norm in (0.1, 1.0, 10.0):
        for damping in (1e-5, 1e-6, 1e-8):
            window = GradientWindow(num_grads, dim, damping=damping)
            half = GradientWindow(num_grads, dim, damping=damping, dtype=torch.bfloat16)
            paper = PaperDynamicInverse(num_grads, dim, damping=damping)
            for grad in synthetic_gradients(num_grads + num_grads // 4, dim, norm):
                window.push(grad)
                half.push(grad)
                from_paper = paper.step(grad)
            oracle = torch.linalg.solve(dense_fisher(paper.grads_MD, damping), grad.double())

            def error(direction: Tensor, oracle: Tensor = oracle) -> float:
                return float((direction.double() - oracle).norm() / oracle.norm())

            bf16 = half.direction()
            rows.append(
                {
                    "norm": norm,
                    "damping": damping,
                    "float32": error(window.direction()),
                    "bfloat16": error(bf16),
                    "bfloat16_cosine": float(torch.cosine_similarity(bf16.double(), oracle, dim=0)),
                    "paper_float32": error(from_paper),
                }
            )
    print_table(
        f"relative error of the direction against float64, m = {num_grads}, d = {dim}",
        ("norm of g", "damping", "float32", "bfloat16", "cosine (bfloat16)", "paper, float32"),
        (
            (
                f"{row['norm']:g}",
                f"{row['damping']:g}",
                f"{row['float32']:.1e}",
                f"{row['bfloat16']:.1e}",
                f"{row['bfloat16_cosine']:.6f}",
                f"{row['paper_float32']:.1e}",
            )
            for row in rows
        ),
    )
    return rows
