"""What studies share: their file, a log of results that is not computed twice, and how results are shown."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from mfac_hf.schema import check_schema
from mfac_hf.storage import read_yaml, written_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "StudyLog",
    "UnsetVariableError",
    "expand_variables",
    "mean_and_deviation",
    "new_figure",
    "read_study",
    "save_figure",
    "study_parser",
]


class UnsetVariableError(ValueError):
    """A study names an environment variable that is not set."""


def expand_variables(text: str) -> str:
    """Put the values of environment variables where a study names them: ``${NAME}/glue``.

    Raises:
        UnsetVariableError: one of them is not set; the message names it.
    """
    expanded = os.path.expandvars(text)
    if unset := re.search(r"\$\{?(\w+)", expanded):
        raise UnsetVariableError(
            f"the study says {text!r}, and the environment variable {unset[1]} is not set: set it, as the head of the "
            "study shows"
        )
    return expanded


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of a study's flags: ``--output`` is the folder of its results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks"), help="folder of the results (default: %(default)s)"
    )
    return parser


class _Row(TypedDict):
    """What every row of a `StudyLog` has."""

    key: dict[str, Any]


def read_study(path: str | os.PathLike[str], keys: Sequence[str], kind: Any = dict[str, Any]) -> dict[str, Any]:
    """Read the YAML file of a study.

    ``base: FILE`` stands for what another study in the same folder holds. Where both have a mapping, such as flags or
    contenders, the entries of both count; otherwise the study's own value does.

    Args:
        path: the file.
        keys: names of what has to be there.
        kind: a ``TypedDict`` of what the study holds (`mfac_hf.schema.check_schema`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is missing, or a value has the wrong type; the message names the first.
    """
    study = _with_base(path)
    for key in keys:
        if key not in study:
            raise ValueError(f"{path} has no {key!r}; the head of this script shows what a study looks like")
    check_schema(study, kind, str(path))
    return study


def _with_base(path: str | os.PathLike[str]) -> dict[str, Any]:
    study: Any = read_yaml(path)
    check_schema(study, dict[str, Any], str(path))
    if (name := study.pop("base", None)) is None:
        return study
    base: Any = read_yaml(Path(path).with_name(str(name)))
    check_schema(base, dict[str, Any], str(name))
    if "base" in base:
        raise ValueError(f"{path}: its base {name} has a base itself; one is as far as it goes")
    both = {key for key in base.keys() & study.keys() if isinstance(base[key], dict) and isinstance(study[key], dict)}
    return {**base, **study, **{key: {**base[key], **study[key]} for key in both}}


class StudyLog:
    """Results of a study, one JSON line each, so that a study that was cut off goes on where it stopped.

    Args:
        path: the file; its directory is made when the first result comes.

    Attributes:
        rows: the results so far; ``key`` says what each is a result of.

    Raises:
        ValueError: the file holds other lines; the message names the first. A last line that was cut off does not
            count, and gives way to the next result.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        content = self.path.read_bytes() if self.path.exists() else b""
        whole, newline, self._torn = content.rpartition(b"\n")
        for number, line in enumerate((whole + newline).splitlines(), start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}, is no JSON, or damaged: {error}") from error
            check_schema(row, _Row, f"{path}, line {number},")
            self.rows.append(row)

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The result with this key; None if there is none.

        Runs from before M-FAC had another metric than the identity do not name theirs among the ``flags`` of the key.
        """
        keys, flags = [key], key.get("flags")
        if isinstance(flags, Mapping) and flags.get("metric") == "identity":
            keys.append({**key, "flags": {name: value for name, value in flags.items() if name != "metric"}})
        return next((row for row in self.rows if row["key"] in keys), None)

    def add(self, key: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """Write a result to the end of the file, whole or not at all, and return it with its key."""
        added = {"key": dict(key), **row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:  # other runs of the study may add to it too
            end = file.tell() - len(self._torn)
            file.truncate(end)
            self._torn = b""
            try:
                _write_all(file, json.dumps(added).encode() + b"\n")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
        self.rows.append(added)
        return added


def _write_all(file: io.FileIO, content: bytes) -> None:
    while content:  # a file without a buffer may take a part
        content = content[file.write(content) :]


def mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± sample standard deviation; of one value, the value alone.

    >>> mean_and_deviation([1.0, 2.0, 3.0])
    '2.0 ± 1.0'
    >>> mean_and_deviation([1.234], digits=2)
    '1.23'
    >>> mean_and_deviation([1.0, math.nan])
    'nan ± nan'
    """
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    # Python 3.11's stdev raises AttributeError where a value is not finite, as that of a run that diverged.
    deviation = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    return f"{mean} ± {deviation:.{digits}f}"


def new_figure(width: float, height: float) -> Figure | None:
    """An empty figure of this size in inches; where matplotlib is not installed, None and a printed line."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install 'mfac_hf[plots]')")
        return None
    from matplotlib.figure import Figure  # here, because matplotlib is an optional dependency

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int) -> None:
    """Save a figure, whole or not at all, in the format that the name of the file ends with."""
    with written_aside(path) as unfinished:
        figure.savefig(unfinished, format=Path(path).suffix.removeprefix("."), dpi=dpi)
