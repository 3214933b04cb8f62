"""Variants of the step in Adam's metric that `mfac_hf.MFAC` could take: ``python scripts/study_window.py``.

Each is written out plainly on one vector of all parameters, without kernels, and trains the demonstration's model
(`mfac_hf.tasks.toy`) with the same schedule (linear, 10 % warm-up), clipping, data and weights for all:

    python scripts/study_window.py --variants adamw nesterov spring --seeds 1 2 3 --steps 250 --batch_size 128

Every variant and seed is a line of ``OUTPUT/window-variants.jsonl`` and is not run again;
``OUTPUT/window-variants.md`` has the table. ``nesterov`` is the step that MFAC takes, ``average`` the
one without the look ahead.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup

from mfac_hf.storage import write_text
from mfac_hf.tasks.toy import toy_dataset, toy_features, toy_model, toy_tokenizer
from mfac_hf.training.study import StudyLog, mean_and_deviation, study_parser

BETA1, BETA2, EPS, WEIGHT_DECAY = 0.9, 0.999, 1e-8, 0.01


@dataclass(frozen=True)
class Variant:
    """What a variant does.

    Attributes:
        num_grads: gradients in the window.
        damping: relative, at the start.
        last_damping: relative, at the end of the run, reached geometrically.
        look_ahead: weight of the newest gradient beside its share of the average.
        spring: decay of the last step that SPRING adds (Goldshlager et al. 2024): c = K⁻¹(w - mu G phi), and
            phi = Gᵀc + mu phi.
        improved: weights times the squared lengths of the gradients, after the improved empirical Fisher
            (Wu et al. 2024), which has the squared gradient of the loss by the logits there.
        correlations: precondition by the matrix of correlations instead of dot products.
        bits: of a stored number, with a scale for each block of 256; None stores float32.
        every: keep every so manyth gradient; the newest always takes part.
    """

    num_grads: int = 8
    damping: float = 0.3
    last_damping: float | None = None
    look_ahead: float = 1 - BETA1
    spring: float = 0.0
    improved: bool = False
    correlations: bool = False
    bits: int | None = None
    every: int = 1


STEP = Variant()
VARIANTS: dict[str, Variant | None] = {
    "adamw": None,
    "nesterov": STEP,
    "average": replace(STEP, look_ahead=0.0),
    "nesterov, nearly undamped": replace(STEP, damping=0.03),
    "nesterov, damping 1": replace(STEP, damping=1.0),
    "nesterov, damping 0.5": replace(STEP, damping=0.5),
    "nesterov, damping 3": replace(STEP, damping=3.0),
    "nesterov alone": replace(STEP, damping=1e6),
    "4 gradients": replace(STEP, num_grads=4),
    "16 gradients": replace(STEP, num_grads=16),
    "32 gradients": replace(STEP, num_grads=32),
    "4 gradients, damping 1": replace(STEP, num_grads=4, damping=1.0),
    "16 gradients, damping 1": replace(STEP, num_grads=16, damping=1.0),
    "falling damping": replace(STEP, damping=1.0, last_damping=0.1),
    "rising damping": replace(STEP, damping=0.1, last_damping=3.0),
    "spring": replace(STEP, look_ahead=0.0, spring=0.5),
    "improved weights": replace(STEP, improved=True),
    "correlations": replace(STEP, correlations=True),
    "correlations, damping 1": replace(STEP, correlations=True, damping=1.0),
    "8 bits": replace(STEP, bits=8),
    "every second gradient": replace(STEP, every=2),
}


class PlainStep:
    """The step of a variant, for one vector of all parameters.

    Args:
        dim: its length.
        variant: what to do.
        steps: of the whole run.
    """

    def __init__(self, dim: int, variant: Variant, steps: int) -> None:
        self.variant, self.steps, self.step = variant, steps, 0
        self.moment_D, self.last_D = torch.zeros(dim), torch.zeros(dim)
        self.rows: list[tuple[int, Tensor]] = []  # step and scaled gradient, oldest first

    def direction(self, grad_D: Tensor) -> Tensor:
        """Take in a gradient, and return what to subtract, in units of the learning rate."""
        variant = self.variant
        self.step += 1
        self.moment_D.lerp_(grad_D.square(), 1 - BETA2)
        scale_D = ((self.moment_D / (1 - BETA2**self.step)).sqrt() + EPS).sqrt()
        if self.rows and (self.rows[-1][0] - 1) % variant.every:
            del self.rows[-1]  # took part while it was the newest
        self.rows = [*self.rows, (self.step, _rounded(grad_D / scale_D, variant.bits))][-variant.num_grads :]
        rows_MD = torch.stack([row for _, row in self.rows])
        ages_M = self.step - torch.tensor([float(step) for step, _ in self.rows])
        target_M = BETA1**ages_M / (BETA1**ages_M).sum() * (1 - variant.look_ahead)
        target_M[-1] += variant.look_ahead
        gram_MM = rows_MD @ rows_MD.T
        found_D = self._solution(rows_MD, gram_MM, target_M)
        length = (target_M @ gram_MM @ target_M).clamp(min=0).sqrt()
        self.last_D = found_D
        return found_D * (length / found_D.norm().clamp(min=1e-30)) / scale_D

    def _solution(self, rows_MD: Tensor, gram_MM: Tensor, target_M: Tensor) -> Tensor:
        variant = self.variant
        squares_M = gram_MM.diagonal()
        if variant.improved:
            target_M = target_M * squares_M / squares_M.mean()
        if variant.correlations:
            gram_MM = gram_MM / (squares_M[:, None] * squares_M).sqrt()
            target_M = target_M * squares_M.sqrt()
        target_M = target_M - variant.spring * (rows_MD @ self.last_D)
        shift = self._damping() * gram_MM.diagonal().mean()
        weights_M = torch.linalg.solve(gram_MM + shift * torch.eye(len(gram_MM)), target_M)
        if variant.correlations:
            weights_M = weights_M / squares_M.sqrt()
        return weights_M @ rows_MD + variant.spring * self.last_D

    def _damping(self) -> float:
        first, last = self.variant.damping, self.variant.last_damping
        return first if last is None else first * (last / first) ** (self.step / self.steps)


def _rounded(row_D: Tensor, bits: int | None) -> Tensor:
    if bits is None:
        return row_D
    blocks = torch.nn.functional.pad(row_D, (0, -len(row_D) % 256)).view(-1, 256)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    return ((blocks / scale).round() * scale).flatten()[: len(row_D)]


def train(variant: Variant | None, seed: int, *, steps: int, batch_size: int, lr: float) -> dict[str, Any]:
    """Train once: mean training loss over the run and over its last tenth, and validation accuracy."""
    splits = toy_features(toy_dataset(steps * batch_size, 1024, seed=seed))
    model = toy_model(seed=seed)
    collate = DataCollatorWithPadding(toy_tokenizer())
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    if variant is not None:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        plain = PlainStep(sum(p.numel() for p in model.parameters()), variant, steps)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    order = torch.randperm(steps * batch_size, generator=torch.Generator().manual_seed(seed)).view(steps, -1)
    losses, started = [], time.process_time()
    for indices in order:
        loss = model(**collate([splits["train"][int(i)] for i in indices])).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if variant is not None:
            _replace_gradients(model, plain.direction, lr=optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        batch = collate([splits["validation"][i] for i in range(1024)])
        right = (model(**batch).logits.argmax(dim=-1) == batch["labels"]).float().mean()
    last = losses[-max(1, steps // 10) :]
    return {
        "accuracy": float(right),
        "last_loss": sum(last) / len(last),
        "mean_loss": sum(losses) / steps,
        "cpu_seconds": time.process_time() - started,
    }


@torch.no_grad()
def _replace_gradients(model: torch.nn.Module, direction: Callable[[Tensor], Tensor], *, lr: float) -> None:
    """Put the direction in the gradients' place, and decay the weights as AdamW does."""
    parameters = list(model.parameters())
    grad_D = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters])
    for p, part in zip(parameters, direction(grad_D).split([p.numel() for p in parameters]), strict=True):
        p.mul_(1 - lr * WEIGHT_DECAY)
        p.grad = part.view_as(p)


def format_table(rows: list[dict[str, Any]], command: str) -> str:
    """One line for each variant, the lowest mean loss first."""
    names = {row["key"]["variant"] for row in rows}
    lines = []
    for name in names:
        mine = [row for row in rows if row["key"]["variant"] == name]
        figures = {key: [row[key] for row in mine] for key in ("mean_loss", "last_loss", "accuracy")}
        cells = [mean_and_deviation(figures[key], 3) for key in ("mean_loss", "last_loss")]
        cells.append(mean_and_deviation([100 * value for value in figures["accuracy"]], 1))
        lines.append((sum(figures["mean_loss"]) / len(mine), f"| {name} | {len(mine)} | {' | '.join(cells)} |"))
    head = "| variant | seeds | training loss, mean | training loss, last tenth | validation accuracy |\n| --- " + (
        "| --- " * 4 + "|\n"
    )
    return f"# window-variants\n\n`{command}`\n\n{head}" + "\n".join(line for _, line in sorted(lines)) + "\n"


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what is missing, write the table, and return the rows."""
    parser = study_parser(__doc__)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    args: argparse.Namespace = parser.parse_args(argv)
    shared = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr}
    log = StudyLog(args.output / "window-variants.jsonl")
    rows = []
    for seed in args.seeds:
        for name in args.variants:
            key = {"variant": name, "seed": seed, **shared}
            rows.append(log.find(**key) or log.add(key, train(VARIANTS[name], seed, **shared)))
            print(name, seed, {key: round(value, 4) for key, value in rows[-1].items() if key != "key"}, flush=True)
    command = "python scripts/study_window.py " + " ".join(f"--{name} {value}" for name, value in shared.items())
    write_text(args.output / "window-variants.md", format_table(rows, command))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
