"""The table of docs/several-devices.md: what models take on a laptop, one GPU, eight, and 64, as `plan_ranks` has it.

    python scripts/benchmark.py --plan_table

Models are shapes alone. A test compares the page with what this makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bench.cost import bert_shapes
from mfac_hf import RankPlan, plan_ranks

WORDS = 30_522
# Hidden size and layers; the others are theirs times four, and 64 numbers a head.
BERTS = {"BERT-tiny": (128, 2), "BERT-mini": (256, 4), "MiniLM, 6 layers": (384, 6)}
BERTS |= {"BERT-base": (768, 12), "BERT-large": (1024, 24)}
LORA = "7B Llama, LoRA of rank 16"
# What it is called, ranks, shards of LoRA's model, and the machine of each rank.
PLACES = [
    ("laptop", 1, 1, "laptop"),
    ("one H100", 1, 1, "h100"),
    ("8 H100, NVLink", 8, 8, "h100"),
    ("64 H100, InfiniBand", 64, 8, "h100-infiniband"),
]
MIB = 1 << 20


class Shapes(nn.Module):
    """Parameters without memory: trained tables and layers, frozen ones in the layers, and frozen ones beside them."""

    def __init__(
        self,
        tables: Sequence[tuple[int, int]],
        trained: Sequence[tuple[int, ...]],
        frozen: Sequence[tuple[int, ...]] = (),
        beside: Sequence[tuple[int, ...]] = (),
    ) -> None:
        super().__init__()
        for number, shape in enumerate(tables):
            self.add_module(f"table{number}", nn.Embedding(*shape, device="meta"))
        self.layers = nn.ModuleList([_list(trained, torch.float32), _list(frozen, torch.bfloat16)])
        self.layers[1].requires_grad_(False)
        self.beside = _list(beside, torch.bfloat16).requires_grad_(False)


def _list(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> nn.ParameterList:
    return nn.ParameterList(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)


def bert(hidden: int, layers: int) -> Shapes:
    """A BERT that classifies into two classes."""
    words, positions, types, *others = bert_shapes(hidden, layers, WORDS)
    return Shapes([words, positions, types], [*others, (2, hidden), (2,)])  # type: ignore[list-item]


def llama_7b(rank: int) -> Shapes:
    """Llama 7B, frozen in bfloat16, with LoRA's float32 factors beside each of its linear layers."""
    hidden, inner, layers, words = 4096, 11_008, 32, 32_000
    linear = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    factors = [shape for out, width in linear for shape in ((rank, width), (out, rank))]
    frozen = [*linear, (hidden,), (hidden,)] * layers
    return Shapes([], factors * layers, frozen, [(words, hidden), (hidden,), (words, hidden)])


def plans() -> list[tuple[str, int, str, RankPlan]]:
    """For each row: model, trained parameters, place, and the plan."""
    rows = []
    models = {name: bert(*sizes) for name, sizes in BERTS.items()} | {LORA: llama_7b(16)}
    for name, model in models.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        for place, ranks, shards, machine in PLACES:
            plan = plan_ranks(model, ranks=ranks, shards=shards if name == LORA else 1, machine=machine)
            rows.append((name, trained, place, plan))
    return rows


def docs_table() -> str:
    """The table, in Markdown."""
    headings = (
        "model (parameters trained)", "ranks", "model and gradients", "window, second moments, step",
        "sent with any optimizer", "sent by MFAC", "MFAC, ms a step", "of it sending",
    )  # fmt: skip
    lines: list[Sequence[Any]] = [headings, ["---"] * len(headings)]
    for name, trained, place, plan in plans():
        held = plan.largest
        beside = held.window + held.second_moment + held.matrices + held.temporary
        others = sum(plan.sent(by) for by in {each.by for each in plan.collectives} - {"MFAC"})
        if plan.shards > 1:
            place += ", FSDP2" if plan.shards == plan.ranks else f", HSDP {plan.ranks // plan.shards} x {plan.shards}"
        lines.append(
            (
                f"{name} ({trained / 1e6:.1f} M)",
                place if plan.fits else f"{place} (too small)",
                _mib(held.total - beside),
                _mib(beside),
                _mib(others) if plan.ranks > 1 else "",
                _mib(plan.sent()) if plan.ranks > 1 else "",
                f"{1e3 * plan.step_seconds:.1f}",
                f"{1e3 * plan.network_seconds():.1f}" if plan.ranks > 1 else "",
            )
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f}" if size >= MIB else "< 1"
