"""The runs of a study: which there are, what each contender's best point is, and which are finished."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mfac_hf.training.study import StudyLog

__all__ = ["MissingRunsError", "StudyRuns", "best_point"]

Run = dict[str, Any]
Flags = dict[str, Any]


class MissingRunsError(ValueError):
    """What a contender needs of another, or of its own tuning, has not been run."""


class StudyRuns:
    """A study and the log of its runs.

    Args:
        study: what `load_study` returned.
        folder: folder of the logs, of other studies too.
    """

    def __init__(self, study: dict[str, Any], folder: Path) -> None:
        self.study, self.folder = study, folder
        self.log = StudyLog(folder / f"{study['log']}.jsonl")

    def taken(self, contender: str) -> Flags:
        """The flags that a contender takes from another one's best point, scaled as it says.

        Raises:
            MissingRunsError: the other one has not been tuned or lacks such a flag.
        """
        take = self.study["contenders"][contender].get("take")
        if take is None:
            return {}
        source, flags = take["from"], None
        if "study" in take:
            path = self.folder / f"{take['study']}.jsonl"
            of = [run["key"] for run in StudyLog(path).rows if run["key"].get("contender") == source]
            flags = next((key["flags"] for key in of if key.get("phase") == "final"), None)
            if flags is None:
                raise MissingRunsError(
                    f"{contender} takes values from {source!r}, of which {path} has no final run: run that study first"
                )
        else:
            flags = self.final_flags(source, self.study["seeds"][0])
        if missing := [name for name in take["flags"] if name not in flags]:
            raise MissingRunsError(
                f"{contender} takes {', '.join(missing)} from {source!r}, whose flags are {', '.join(flags)}"
            )
        return {name: flags[name] * take["scale"].get(name, 1) for name in take["flags"]}

    def shared_flags(self, contender: str) -> Flags:
        """The flags of all runs of a contender."""
        return {**self.study["flags"], **self.study["contenders"][contender]["flags"], **self.taken(contender)}

    def tuning_flags(self, contender: str, point: Flags) -> Flags:
        """The flags of a tuning run."""
        tuning, spec = self.study["tuning"], self.study["contenders"][contender]
        flags = {**self.shared_flags(contender), **point, **tuning["flags"], **spec["tuning_flags"]}
        held_out = {name: tuning[name] for name in ("holdout_fraction", "holdout") if name in tuning}
        return {**flags, "seed": tuning["seed"], **held_out}

    def final_flags(self, contender: str, seed: int) -> Flags:
        """The flags of a final run at the best point.

        Raises:
            MissingRunsError: the contender has not been tuned, or what it takes is not there.
            RuntimeError: all its tuning runs failed.
        """
        return {**self.shared_flags(contender), **self.best_point(contender), "seed": seed}

    def best_point(self, contender: str) -> Flags:
        """The best point of the contender's grid."""
        grid = self.study["contenders"][contender]["grid"]
        runs = self.tuning_runs(contender)
        if len(grid) > 1 and len(runs) < len(grid):
            raise MissingRunsError(
                f"{contender} is not tuned: {len(runs)} of its {len(grid)} points were run; run it first"
            )
        return best_point(runs, contender, grid, self.study["tuning"]["metric"])

    def points(self, contender: str) -> list[Flags]:
        """The points to try: none where there is nothing to choose."""
        grid: list[Flags] = self.study["contenders"][contender]["grid"]
        return grid if len(grid) > 1 else []

    def tuning_runs(self, contender: str) -> list[Run]:
        """The finished tuning runs of a contender."""
        keys = [self.tuning_flags(contender, point) for point in self.points(contender)]
        found = (self.log.find(contender=contender, phase="tuning", flags=flags) for flags in keys)
        return [run for run in found if run is not None]

    def final_runs(self, contender: str) -> list[Run]:
        """The finished final runs of a contender that did not fail; none if it has not been tuned."""
        try:
            keys = [self.final_flags(contender, seed) for seed in self.study["seeds"]]
        except (MissingRunsError, RuntimeError):
            return []
        found = (self.log.find(contender=contender, phase="final", flags=flags) for flags in keys)
        return [run for run in found if run is not None and run["value"] is not None]


def best_point(runs: list[Run], contender: str, grid: list[Flags], metric: str) -> Flags:
    """The point of the grid that is best on the held-out part: with the lowest loss, or the highest other metric."""
    if len(grid) == 1:
        return grid[0]
    values = {json.dumps(run["point"]): held_out_value(run, metric) for run in runs}
    values = {point: value for point, value in values.items() if value is not None and math.isfinite(value)}
    if not values:
        raise RuntimeError(f"every tuning run of {contender} failed; its last error: {runs[-1].get('error')}")
    sign = -1 if lower_is_better(metric, runs) else 1
    tried = [point for point in grid if json.dumps(point) in values]
    return max(tried, key=lambda point: sign * values[json.dumps(point)])


def held_out_value(run: Run, metric: str) -> float | None:
    """What a tuning run is judged by; None of a run that failed."""
    return run["results"][metric] if run["value"] is not None else None


def lower_is_better(metric: str, runs: list[Run]) -> bool:
    """Whether this metric, or what a task selects by, is a loss."""
    if metric == "selection_value":
        metric = next((run["metric"] for run in runs if run["value"] is not None), metric)
    return metric.endswith("loss")
