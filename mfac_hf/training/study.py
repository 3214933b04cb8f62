"""What studies share: their file, a log of results that is not computed twice, and how results are shown."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["StudyLog", "mean_and_deviation", "new_figure", "read_study", "study_parser"]


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of a study's flags: ``--output`` is the folder of its results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks"), help="folder of the results (default: %(default)s)"
    )
    return parser


def read_study(path: str | os.PathLike[str], keys: Sequence[str]) -> dict[str, Any]:
    """Read the YAML file of a study.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is missing; the message names the first.
    """
    study: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for key in keys:
        if key not in study:
            raise ValueError(f"{path} has no {key!r}; the head of this script shows what a study looks like")
    return study


class StudyLog:
    """Results of a study, one JSON line each, so that a study that was cut off goes on where it stopped.

    Args:
        path: the file; its directory is made when the first result comes.

    Attributes:
        rows: the results so far; ``key`` says what each is a result of.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The result with this key; None if there is none."""
        return next((row for row in self.rows if row["key"] == key), None)

    def add(self, key: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """Write a result to the file, and return it with its key."""
        self.rows.append({"key": dict(key), **row})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        return self.rows[-1]


def mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± sample standard deviation; of one value, the value alone.

    >>> mean_and_deviation([1.0, 2.0, 3.0])
    '2.0 ± 1.0'
    >>> mean_and_deviation([1.234], digits=2)
    '1.23'
    """
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def new_figure(width: float, height: float) -> Figure | None:
    """An empty figure of this size in inches; where matplotlib is not installed, None and a printed line."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install 'mfac_hf[plots]')")
        return None
    from matplotlib.figure import Figure  # here, because matplotlib is an optional dependency

    return Figure(figsize=(width, height), layout="constrained")
