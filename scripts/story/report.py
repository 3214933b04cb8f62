"""What the runs of the demonstration say: a table, sentences that follow from its figures, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mfac_hf.training.curve import first_reach
from mfac_hf.training.study import mean_and_deviation, new_figure, save_figure
from story.runs import Files, Run

__all__ = ["compare", "draw", "find", "make_table"]

LABELS = {"adamw": "AdamW", "mfac": "M-FAC", "magnitude": "magnitude"}
COLORS = {"adamw": "tab:blue", "mfac": "tab:red", "magnitude": "tab:gray"}


def by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each optimizer or method, in the order of the seeds."""
    return {name: [run for run in runs if run.name == name] for name in dict.fromkeys(run.name for run in runs)}


def percent(runs: Sequence[Run]) -> list[float]:
    """Their validation accuracies."""
    return [100 * run.validation_accuracy for run in runs]


def make_table(trainings: Sequence[Run], prunings: Sequence[Run], files: Files) -> Table:
    """One row for each optimizer, and one for each method of pruning."""
    seeds = len({run.seed for run in trainings})
    table = Table(title=f"Mean of {seeds} seeds ± standard deviation" if seeds > 1 else "One seed")
    table.add_column("", no_wrap=True)
    for column in ("training\nloss", "validation\naccuracy, %", "CPU\nseconds", "file,\nkB"):
        table.add_column(column, justify="right", no_wrap=True)
    for runs, size in ((trainings, files.dense), (prunings, files.sparse)):
        for name, mine in by_name(runs).items():
            sparsity = mine[0].accuracies[-1][1]
            table.add_row(
                f"{100 * sparsity:g} % pruned, {LABELS[name]}" if sparsity else LABELS[name],
                mean_and_deviation([run.train_loss for run in mine], 3),
                mean_and_deviation(percent(mine), 1),
                mean_and_deviation([run.cpu_seconds for run in mine], 1),
                f"{size / 1000:.0f}",
            )
        table.add_section()
    return table


def compare(what: str, ours: Sequence[float], theirs: Sequence[float], other: str, *, sign: int, digits: int) -> str:
    """Say which of two is ahead, and no more than the seeds show.

    Args:
        what: the quantity, at the beginning of the sentence.
        ours: M-FAC's values, one for each seed.
        theirs: those of the other one, with the same seeds.
        other: its name.
        sign: 1 where more is better, -1 where less is.
        digits: after the point.
    """
    gains = [sign * (a - b) for a, b in zip(ours, theirs, strict=True)]
    figures = f"{what}: M-FAC {mean_and_deviation(ours, digits)}, {other} {mean_and_deviation(theirs, digits)}."
    wins, losses = (sum(side * gain > 0 for gain in gains) for side in (1, -1))
    if len(gains) == 1:
        return f"{figures} One seed, so the difference may be chance."
    if max(wins, losses) == 0:
        return f"{figures} No difference."
    leader, ahead, side = ("M-FAC", wins, 1) if wins >= losses else (other, losses, -1)
    margin = mean_and_deviation([side * gain for gain in gains], digits)
    if ahead == len(gains):
        return f"{figures} {leader} is ahead on each of {ahead} seeds, by {margin}."
    return f"{figures} Not separated: {leader} is ahead on {ahead} of {len(gains)} seeds, by {margin} on average."


def steps_to_loss(mfac: Sequence[Run], adamw: Sequence[Run]) -> str:
    """Say when M-FAC has the loss that AdamW ends with, and when AdamW had it first."""
    steps: dict[str, list[float]] = {"mfac": [], "adamw": []}
    for ours, theirs in zip(mfac, adamw, strict=True):
        for run in (ours, theirs):
            if (index := first_reach(run.curve, theirs.train_loss)) is not None:
                steps[run.name].append(run.curve["step"][index])
    told = f"AdamW's last training loss: AdamW has it first at step {mean_and_deviation(steps['adamw'], 0)}, M-FAC "
    count = len(steps["mfac"])
    if count == 0:
        return f"{told}on no seed."
    return f"{told}at {mean_and_deviation(steps['mfac'], 0)} ({count} of {len(mfac)} seeds)."


def find(trainings: Sequence[Run], prunings: Sequence[Run], files: Files) -> list[str]:
    """What the figures say, in sentences."""
    trained, pruned = by_name(trainings), by_name(prunings)
    mfac, adamw = trained["mfac"], trained["adamw"]
    losses = [[run.train_loss for run in runs] for runs in (mfac, adamw)]
    what = f"Training loss after {mfac[0].curve['step'][-1]} steps"
    sparsity = 100 * prunings[0].accuracies[-1][1]
    before = (
        f"Accuracy in %, {mean_and_deviation(percent(mfac), 1)} before and now {sparsity:g} % of the encoder pruned"
    )
    size = f"{files.sparse / 1000:.0f} kB in place of {files.dense / 1000:.0f}"
    difference = files.largest_difference
    same = "its outputs are the same" if difference == 0 else f"its outputs differ by up to {difference:.1g}"
    return [
        compare(what, *losses, "AdamW", sign=-1, digits=3),
        steps_to_loss(mfac, adamw),
        compare("Validation accuracy in %", percent(mfac), percent(adamw), "AdamW", sign=1, digits=1),
        compare(before, percent(pruned["mfac"]), percent(pruned["magnitude"]), "magnitude", sign=1, digits=1),
        f"Sparse file: {size} ({100 * files.sparse / files.dense:.0f} %); loaded again, {same}.",
    ]


def band(axes: Any, x: Sequence[float], values: Sequence[Sequence[float]], name: str, **style: Any) -> None:
    """Draw the mean of several seeds' values, and their standard deviation as a band around it."""
    mean = np.mean(values, axis=0)
    spread = np.std(values, axis=0, ddof=1) if len(values) > 1 else 0 * mean
    axes.plot(x, mean, color=COLORS[name], label=LABELS[name], **style)
    axes.fill_between(x, mean - spread, mean + spread, color=COLORS[name], alpha=0.15, linewidth=0)


def draw(trainings: Sequence[Run], prunings: Sequence[Run], files: Files, path: Path) -> bool:
    """Save the picture where matplotlib is installed; whether it is."""
    if (figure := new_figure(10, 6)) is None:
        return False
    (loss_axes, accuracy_axes), (pruning_axes, file_axes) = figure.subplots(2, 2)
    loss_axes.set(title="Training loss", xlabel="step", ylabel="cross-entropy", ylim=(0, None))
    accuracy_axes.set(title="Validation accuracy", xlabel="step", ylabel="%")
    pruning_axes.set(title="Validation accuracy while M-FAC's model is pruned", xlabel="sparsity", ylabel="%")
    for name, runs in by_name(trainings).items():
        band(loss_axes, runs[0].curve["step"], [run.curve["loss"] for run in runs], name)
        band_of_accuracies(accuracy_axes, runs)
    before = np.mean(percent(by_name(trainings)["mfac"]))
    pruning_axes.axhline(before, color=COLORS["mfac"], linestyle=":", label="before")
    for runs in by_name(prunings).values():
        band_of_accuracies(pruning_axes, runs)
    steps, sparsities, _ = zip(*prunings[0].accuracies, strict=True)
    pruning_axes.set_xticks(
        steps, [f"{100 * sparsity:.0f} %\nstep {step}" for step, sparsity in zip(steps, sparsities, strict=True)]
    )
    bars = file_axes.barh(["sparse file", "dense file"], [files.sparse / 1000, files.dense / 1000], color="tab:gray")
    file_axes.bar_label(bars, fmt="%.0f kB", padding=3)
    file_axes.set(title="The pruned model on disk", xlabel="kB", xlim=(0, 1.25 * files.dense / 1000))
    for axes in (loss_axes, accuracy_axes, pruning_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path, dpi=100)
    return True


def band_of_accuracies(axes: Any, runs: Sequence[Run]) -> None:
    """Draw the validation accuracies of several seeds by step."""
    steps = [step for step, _, _ in runs[0].accuracies]
    accuracies = [[100 * accuracy for _, _, accuracy in run.accuracies] for run in runs]
    band(axes, steps, accuracies, runs[0].name, marker=".")
