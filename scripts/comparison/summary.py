"""One table over several studies: what M-FAC with AdamW's values, and M-FAC tuned, gain on each task."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from comparison.tables import percent, spread

__all__ = ["format_summary", "verdict"]

# Names of contenders that the first table has a place for, beside a study's baseline.
DROP_IN, TUNED = "mfac, drop-in", "mfac, tuned"
# Of a metric or a loss, whether less is better.
FIGURES = {"metric": False, "validation loss": True, "training loss": True}
ENOUGH = 0.75  # of the baseline's steps: the aim


def format_summary(studies: Sequence[Mapping[str, Any]], summaries: Mapping[str, Any], name: str) -> str:
    """The tables as Markdown.

    Args:
        studies: what `load_study` returned, each with a baseline.
        summaries: by the study's name, what `summarize` returned.
        name: heading.

    Raises:
        ValueError: a study has no baseline.
    """
    for study in studies:
        if "baseline" not in study:
            raise ValueError(f"study {study['name']} names no baseline; add `baseline:` with the contender to beat")
    done = [study for study in studies if study["baseline"] in summaries[study["name"]]]
    lines = [f"# {name}", "", *_tasks(done, summaries), "", *_counts(done, summaries)]
    if missing := [study["name"] for study in studies if study not in done]:
        lines += ["", f"No final run of the baseline yet: {', '.join(missing)}."]
    return "\n".join([*lines, *_others(done, summaries)]) + "\n"


def _tasks(studies: Sequence[Mapping[str, Any]], summaries: Mapping[str, Any]) -> list[str]:
    lines = [
        "Each cell: baseline / M-FAC with its values and all other defaults / M-FAC tuned. Steps and CPU seconds: "
        "those until the running mean of the training loss is what the baseline's is at the end, over its own.",
        "",
        "| task | seeds | metric | | validation loss | training loss | steps | CPU seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for study in studies:
        summary = summaries[study["name"]]
        rows = [summary.get(one) for one in (study["baseline"], DROP_IN, TUNED)]
        cells = [study["name"], str(len(rows[0]["seeds"])), rows[0]["metric"].removeprefix("eval_")]
        for figure, digits in (("metric", 2), ("validation loss", 4), ("training loss", 4)):
            cells.append(" / ".join("-" if row is None else spread(_figure(row, figure), digits) for row in rows))
        for ratio in ("steps_ratio", "seconds_ratio"):
            cells.append(" / ".join("-" if row is None else spread(row[ratio], 2) for row in rows[1:]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _figure(row: Mapping[str, Any], figure: str) -> list[float | None]:
    """By seed one of `FIGURES`."""
    if figure == "metric":
        return list(percent(row["values"]))
    return list(row["eval_loss" if figure == "validation loss" else "train_loss"])


def verdict(mine: Mapping[str, Any], other: Mapping[str, Any], figure: str) -> int | None:
    """1 ahead, -1 behind, 0 level: whether the mean difference over common seeds exceeds its own standard error.

    Args:
        mine: a contender's part of a summary.
        other: the baseline's.
        figure: one of `FIGURES`.

    Returns:
        None where fewer than two seeds have both figures.
    """
    figures = [dict(zip(row["seeds"], _figure(row, figure), strict=True)) for row in (mine, other)]
    pairs = [(figures[0].get(seed), value) for seed, value in figures[1].items()]
    differences = [one - two for one, two in pairs if one is not None and two is not None]
    if len(differences) < 2:
        return None
    less_is_better = FIGURES[figure] or (figure == "metric" and mine["metric"].endswith("loss"))
    mean = statistics.mean(differences) * (-1 if less_is_better else 1)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return 0 if abs(mean) <= error else 1 if mean > 0 else -1


def _counts(studies: Sequence[Mapping[str, Any]], summaries: Mapping[str, Any]) -> list[str]:
    """On how many tasks each contender is ahead of the baseline, level and behind."""
    lines = [
        "Tasks on which a contender is ahead of the baseline / level / behind, by the mean difference between runs of "
        "the same seed and its standard error; and tasks on which all seeds reach the baseline's loss, those in "
        f"{ENOUGH:.0%} of its steps, and those in no more CPU seconds, by the means.",
        "",
        f"| contender | tasks | {' | '.join(FIGURES)} | reached | in {ENOUGH:.0%} of the steps | in no more seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for contender in _contenders(studies, summaries):
        pairs = [
            (summaries[study["name"]][contender], summaries[study["name"]][study["baseline"]])
            for study in studies
            if contender in summaries[study["name"]]
        ]
        cells = [contender, str(len(pairs))]
        for figure in FIGURES:
            found = [verdict(mine, other, figure) for mine, other in pairs]
            cells.append(" / ".join(str(found.count(one)) for one in (1, 0, -1)))
        reached = [mine for mine, _ in pairs if None not in mine["steps_ratio"]]
        fast = [row for row in reached if statistics.mean(row["steps_ratio"]) <= ENOUGH]
        cheap = [row for row in reached if statistics.mean(row["seconds_ratio"]) <= 1]
        lines.append(f"| {' | '.join([*cells, str(len(reached)), str(len(fast)), str(len(cheap))])} |")
    return lines


def _contenders(studies: Sequence[Mapping[str, Any]], summaries: Mapping[str, Any]) -> list[str]:
    """All contenders that are nobody's baseline and have results, M-FAC first."""
    names = dict.fromkeys((DROP_IN, TUNED))
    for study in studies:
        names |= dict.fromkeys(name for name in summaries[study["name"]] if name != study["baseline"])
    return [name for name in names if any(name in summaries[study["name"]] for study in studies)]


def _others(studies: Sequence[Mapping[str, Any]], summaries: Mapping[str, Any]) -> list[str]:
    """Every contender on every task, where there are more than the first table has a place for."""
    names = _contenders(studies, summaries)
    if not set(names) - {DROP_IN, TUNED}:
        return []
    lines = [
        "",
        "All contenders; in bold the best mean of a task.",
        "",
        "| task | contender | metric | validation loss | training loss | steps | CPU seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    wins = {figure: dict.fromkeys(names, 0) for figure in FIGURES}
    for study in studies:
        summary = summaries[study["name"]]
        best = {figure: _best(summary, figure) for figure in FIGURES}
        for name, row in summary.items():
            cells = [study["name"], name]
            for figure, digits in zip(FIGURES, (2, 4, 4), strict=True):
                shown = spread(_figure(row, figure), digits)
                cells.append(f"**{shown}**" if best[figure] == name else shown)
            cells += [spread(row["steps_ratio"], 2), spread(row["seconds_ratio"], 2)]
            lines.append(f"| {' | '.join(cells)} |")
        for figure, name in best.items():
            if name is not None:
                wins[figure][name] = wins[figure].get(name, 0) + 1
    lines += ["", f"| best on so many tasks | {' | '.join(FIGURES)} |", "| --- | --- | --- | --- |"]
    everyone = dict.fromkeys(name for counts in wins.values() for name in counts)
    lines += [f"| {name} | {' | '.join(str(wins[f].get(name, 0)) for f in FIGURES)} |" for name in everyone]
    return lines


def _best(summary: Mapping[str, Any], figure: str) -> str | None:
    """The contender with the best mean; None where no one has the figure for all seeds."""
    means = {}
    for name, row in summary.items():
        if None not in (values := _figure(row, figure)):
            sign = -1 if FIGURES[figure] or row["metric"].endswith("loss") else 1
            means[name] = sign * statistics.mean(value for value in values if value is not None)
    return max(means, key=lambda name: means[name], default=None)
