"""The form of a study of optimizers, and what is refused before a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from mfac_hf.schema import check_schema
from mfac_hf.training.study import read_study

__all__ = ["load_study"]

CONTENDER_KEYS = ("flags", "tuning_flags", "grid", "take")


class TuningOptions(TypedDict, total=False):
    """What the tuning of a study may have."""

    metric: str
    flags: dict[str, Any]
    holdout_fraction: float
    holdout: int


class Tuning(TuningOptions):
    """What it has to have."""

    seed: int


class StudyOptions(TypedDict, total=False):
    """What a study may have."""

    log: str
    baseline: str


class Study(StudyOptions):
    """What it has to have."""

    name: str
    script: str
    flags: dict[str, Any]
    seeds: list[int]
    tuning: Tuning
    contenders: dict[str, dict[str, Any]]


def load_study(path: Path) -> dict[str, Any]:
    """Read a study; a ValueError names the first thing that is missing or wrong."""
    study = read_study(path, ("name", "script", "flags", "seeds", "tuning", "contenders"), Study)
    study["tuning"] = {"metric": "selection_value", "flags": {}, **study["tuning"]}
    study["log"] = study.get("log", study["name"])
    if len({"holdout_fraction", "holdout"} & study["tuning"].keys()) != 1:
        raise ValueError(f"{path}: tuning has {', '.join(study['tuning'])}; expected holdout_fraction, or holdout")
    earlier: list[str] = []
    for name, spec in study["contenders"].items():
        _check_contender(path, name, spec, earlier)
        earlier.append(name)
    if study.get("baseline", earlier[0]) not in earlier:
        raise ValueError(
            f"{path}: baseline {study['baseline']!r} is no contender; expected one of {'; '.join(earlier)}"
        )
    return study


def _check_contender(path: Path, name: str, spec: dict[str, Any], earlier: list[str]) -> None:
    """Check one contender, and fill in what it leaves out."""
    where = f"{path}: contender {name!r}"
    if unknown := sorted(spec.keys() - set(CONTENDER_KEYS)):
        raise ValueError(f"{where} has {unknown}; expected {', '.join(CONTENDER_KEYS)} alone")
    for key in ("flags", "tuning_flags"):
        if not isinstance(spec.setdefault(key, {}), dict):
            raise ValueError(f"{path}: {key} of contender {name!r} are {spec[key]!r}; expected {{name: value}}")
    check_schema(spec.get("grid") or [], list[dict[str, Any]], f"{path}: the grid of contender {name!r}")
    if "take" not in spec:
        if not spec.get("grid"):
            raise ValueError(f"{where} has an empty grid; expected at least one point, or take")
        return
    spec.setdefault("grid", [{}])
    take = spec["take"]
    check_schema(take, dict[str, Any], f"{where}, take,")
    if not {"from", "flags"} <= take.keys() <= {"from", "flags", "study", "scale"}:
        raise ValueError(f"{where}: take has {', '.join(take)}; expected from and flags, and at most study and scale")
    check_schema(take["flags"], list[str], f"{where}, flags of take,")
    check_schema(take.setdefault("scale", {}), dict[str, float], f"{where}, scale of take,")
    if "study" not in take and take["from"] not in earlier:
        raise ValueError(f"{where} takes from {take['from']!r}; expected a contender before it: {'; '.join(earlier)}")
    if unknown := sorted(set(take["scale"]) - set(take["flags"])):
        raise ValueError(f"{where} scales {unknown}, which it does not take")
