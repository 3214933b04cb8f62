"""What the final runs of a study say, by contender, and the study's tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from comparison.runs import Run, StudyRuns, held_out_value
from mfac_hf.training.curve import final_loss, first_reach
from mfac_hf.training.study import mean_and_deviation

__all__ = ["format_study", "spread", "summarize"]

Figures = list[float | None]


def summarize(runs: StudyRuns) -> dict[str, Any]:
    """The figures of each contender that has final runs: lists have an entry for each seed, None where unknown."""
    study = runs.study
    targets = _targets(runs.final_runs(study["baseline"])) if "baseline" in study else {}
    summary = {}
    for contender in study["contenders"]:
        if not (final := runs.final_runs(contender)):
            continue
        curves = [run["results"].get("curve") for run in final]
        reached = [_reached(run, targets) for run in final]
        values = [run["value"] for run in final]
        epochs = study["flags"].get("num_train_epochs", study["flags"].get("nepochs", 3))
        summary[contender] = {
            "point": {**runs.taken(contender), **final[0]["point"]},
            "metric": final[0]["metric"],
            "seeds": [_seed(run) for run in final],
            "values": values,
            "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "seconds_per_epoch": statistics.mean(run["results"]["train_runtime"] / epochs for run in final),
            "peak_memory_gib": max(run["peak_memory_gib"] for run in final),
            "eval_loss": [run["results"].get("eval_loss") for run in final],
            "train_loss": [None if curve is None else final_loss(curve) for curve in curves],
            "ms_per_step": [None if curve is None else _per_step(curve, "seconds") for curve in curves],
            "cpu_ms_per_step": [None if curve is None else _per_step(curve, "cpu_seconds") for curve in curves],
            **{name: [None if one is None else one[name] for one in reached] for name in _REACHED},
            "tuning": [
                (run["point"], held_out_value(run, study["tuning"]["metric"])) for run in runs.tuning_runs(contender)
            ],
        }
    return summary


# Of the first log at which a run has the baseline's last loss: the step and the CPU seconds until then, and their
# ratios to the baseline's own.
_REACHED = ("steps", "cpu_seconds", "steps_ratio", "seconds_ratio")


def _targets(runs: Sequence[Run]) -> dict[int, dict[str, float]]:
    """By seed the loss that the baseline ends with, and where it had that first."""
    targets = {}
    for run in runs:
        if (curve := run["results"].get("curve")) is not None:
            loss = final_loss(curve)
            first = first_reach(curve, loss)
            assert first is not None  # its last log, if no other
            targets[_seed(run)] = {"loss": loss, **{name: curve[name][first] for name in ("step", "cpu_seconds")}}
    return targets


def _reached(run: Run, targets: dict[int, dict[str, float]]) -> dict[str, float] | None:
    """Where a run has the last loss of the baseline's run of the same seed; None if nowhere."""
    curve, target = run["results"].get("curve"), targets.get(_seed(run))
    if curve is None or target is None or (index := first_reach(curve, target["loss"])) is None:
        return None
    steps, seconds = curve["step"][index], curve["cpu_seconds"][index]
    ratios = (steps / target["step"], seconds / target["cpu_seconds"])
    return dict(zip(_REACHED, (steps, seconds, *ratios), strict=True))


def _seed(run: Run) -> int:
    seed: int = run["key"]["flags"]["seed"]
    return seed


def _per_step(curve: dict[str, Any], clock: str) -> float:
    milliseconds: float = 1e3 * curve[clock][-1] / curve["step"][-1]
    return milliseconds


def spread(values: Figures, digits: int) -> str:
    """Mean ± standard deviation of the known ones and, where some are unknown, how many are known.

    >>> spread([1.0, None, 3.0], 1)
    '2.0 ± 1.4 (2 of 3)'
    >>> spread([None], 1)
    '-'
    """
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return mean_and_deviation(known, digits) + (
        f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    )


def percent(values: Sequence[float]) -> list[float]:
    """A metric times 100 where it is a share; others as they are."""
    return [100 * value for value in values] if max(map(abs, values)) <= 1 else list(values)


def format_study(study: dict[str, Any], summary: dict[str, Any]) -> str:
    """The summary as Markdown: results, training, tuning."""
    return "\n".join([*_head(study, summary), *_results(summary), *_training(study, summary), *_tried(summary)]) + "\n"


def _head(study: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    tuning, tuned = study["tuning"], any(row["tuning"] for row in summary.values())
    held_out = f"{tuning['holdout_fraction']:g}" if "holdout_fraction" in tuning else f"{tuning['holdout']} examples"
    return [
        f"# {study['name']}",
        "",
        f"`{study['script']}` with {', '.join(f'{k}={v}' for k, v in study['flags'].items())}; "
        f"seeds {study['seeds']}.",
        f"Tuned with one run per point (seed {tuning['seed']}) on a held-out {held_out} of the training split, by "
        f"{tuning['metric']}{', with ' + str(tuning['flags']) if tuning['flags'] else ''}; "
        "the first table is on the evaluation split."
        if tuned
        else "Nothing was tuned: each grid has one point.",
    ]


def _results(summary: dict[str, Any]) -> list[str]:
    lines = ["", "| optimizer | chosen | metric | mean ± std | each seed | s / epoch | peak GiB |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, row in summary.items():
        values = percent(row["values"])
        mean, std = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        lines.append(
            f"| {name} | {_point(row['point'])} | {row['metric'].removeprefix('eval_')} | {mean:.2f} ± {std:.2f} | "
            f"{', '.join(f'{value:.2f}' for value in values)} | {row['seconds_per_epoch']:.0f} | "
            f"{row['peak_memory_gib']:.2f} |"
        )
    return lines


def _training(study: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """The training itself, where curves were recorded."""
    if all(value is None for row in summary.values() for value in row["train_loss"]):
        return []
    heads = ["optimizer", "training loss", "validation loss", "ms / step", "CPU ms / step"]
    baseline = study.get("baseline")
    if baseline is not None:
        heads += [f"steps to {baseline}'s loss", "/ its steps", "CPU s to that loss", "/ its seconds"]
    lines = ["", _row(heads), _row(["---"] * len(heads))]
    for name, row in summary.items():
        cells = [name, spread(row["train_loss"], 4), spread(row["eval_loss"], 4)]
        cells += [spread(row["ms_per_step"], 1), spread(row["cpu_ms_per_step"], 1)]
        if baseline is not None:
            cells += [spread(row["steps"], 0), spread(row["steps_ratio"], 2)]
            cells += [spread(row["cpu_seconds"], 1), spread(row["seconds_ratio"], 2)]
        lines.append(_row(cells))
    lines += ["", "Training loss: mean of the last tenth of the run. A step is forward, backward and optimizer."]
    if baseline is not None:
        lines.append(
            f"Steps to {baseline}'s loss: until the running mean over a tenth of the run is first not above what "
            f"{baseline} of the same seed ends with; the ratios are to when {baseline} itself is first there."
        )
    return lines


def _tried(summary: dict[str, Any]) -> list[str]:
    if not any(row["tuning"] for row in summary.values()):
        return []
    lines = ["", "| optimizer | tuning point | held-out value |", "| --- | --- | --- |"]
    for name, row in summary.items():
        for point, value in row["tuning"]:
            lines.append(f"| {name} | {_point(point)} | {'failed' if value is None else f'{value:.4f}'} |")
    return lines


def _point(point: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in point.items()
    )


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
