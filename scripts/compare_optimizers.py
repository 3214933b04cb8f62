"""Compare optimizers on one task with equal tuning: ``python scripts/compare_optimizers.py STUDY.yaml``.

A study names a training script, the flags that all runs share, and for each contender a grid of flags:

    name: sst2-bert-tiny
    script: run_glue.py
    flags: {model_name_or_path: MODEL, dataset_name: DATA, task_name: sst2, num_train_epochs: 2}
    seeds: [1, 2, 3]
    tuning: {holdout_fraction: 0.1, seed: 0}
    contenders:
      adamw: {flags: {optim_name: adamw}, grid: [{learning_rate: 1e-4}, {learning_rate: 3e-4}]}
      mfac: {flags: {optim_name: mfac, num_grads: 512}, grid: [{learning_rate: 1e-3}, {learning_rate: 3e-3}]}

Every point of every grid is trained once without a held-out part of the *training* split and judged on that part, by
the task's own metric or by ``tuning: {metric: eval_loss}``. ``tuning: {flags: {...}}`` makes these runs shorter for
all contenders alike; ``tuning_flags: {...}`` of a contender changes them for it alone. The best point of each
contender is then trained with every seed and judged on the validation split, which no run before has seen. A grid of
one point is not tuned. Each run is a process of its own. ``OUTPUT/NAME.jsonl`` keeps finished runs, with their flags,
and they are not repeated, so a study that was cut off goes on where it stopped. ``OUTPUT/NAME.md`` has the table.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, TypedDict

from mfac_hf.schema import check_schema
from mfac_hf.storage import write_text
from mfac_hf.training.study import StudyLog, read_study, study_parser

SCRIPTS = Path(__file__).parent
SHARED_FLAGS = {"do_train": True, "do_eval": True, "save_strategy": "no", "eval_strategy": "no", "report_to": "none"}


class TuningOptions(TypedDict, total=False):
    """What the tuning of a study may have."""

    metric: str
    flags: dict[str, Any]


class Tuning(TuningOptions):
    """What it has to have."""

    holdout_fraction: float
    seed: int


class Study(TypedDict):
    """The form of a study."""

    name: str
    script: str
    flags: dict[str, Any]
    seeds: list[int]
    tuning: Tuning
    contenders: dict[str, dict[str, Any]]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what the study still lacks, write its table, and return its summary."""
    parser = study_parser(__doc__)
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--only", nargs="+", default=None, help="contenders to run now (default: all)")
    args = parser.parse_args(argv)
    try:
        study = load_study(args.study)
        if unknown := set(args.only or []) - set(study["contenders"]):
            raise ValueError(f"--only {', '.join(sorted(unknown))}: the study has {'; '.join(study['contenders'])}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    log, tuning = StudyLog(args.output / f"{study['name']}.jsonl"), study["tuning"]
    for contender, spec in study["contenders"].items():
        if args.only is not None and contender not in args.only:
            continue
        shared = {**study["flags"], **spec["flags"]}
        for point in spec["grid"] if len(spec["grid"]) > 1 else ():
            flags = {**shared, **point, **tuning["flags"], **spec["tuning_flags"], "seed": tuning["seed"]}
            flags["holdout_fraction"] = tuning["holdout_fraction"]
            run_once(study, contender, "tuning", point, flags, log)
        best = best_point(log.rows, contender, spec["grid"], tuning["metric"])
        for seed in study["seeds"]:
            run_once(study, contender, "final", best, {**shared, **best, "seed": seed}, log)
    summary = summarize(study, log.rows)
    table = format_table(study, summary)
    write_text(args.output / f"{study['name']}.md", table)
    print(table)
    return summary


def load_study(path: Path) -> dict[str, Any]:
    """Read a study; a ValueError names the first thing that is missing or wrong."""
    study = read_study(path, ("name", "script", "flags", "seeds", "tuning", "contenders"), Study)
    study["tuning"] = {"metric": "selection_value", "flags": {}, **study["tuning"]}
    for name, spec in study["contenders"].items():
        check_schema(spec.get("grid") or [], list[dict[str, Any]], f"{path}: the grid of contender {name!r}")
        if not spec.get("grid"):
            raise ValueError(f"{path}: contender {name!r} has an empty grid; expected at least one point")
        if unknown := sorted(spec.keys() - {"flags", "tuning_flags", "grid"}):
            raise ValueError(f"{path}: contender {name!r} has {unknown}; expected flags, tuning_flags and grid alone")
        for key in ("flags", "tuning_flags"):
            if not isinstance(spec.setdefault(key, {}), dict):
                raise ValueError(f"{path}: {key} of contender {name!r} are {spec[key]!r}; expected {{name: value}}")
    return study


def run_once(
    study: dict[str, Any], contender: str, phase: str, point: dict[str, Any], flags: dict[str, Any], log: StudyLog
) -> None:
    """Train and evaluate once, unless the log has this very run; a run that fails counts as the worst result."""
    key = {"contender": contender, "phase": phase, "flags": flags}
    if log.find(**key) is not None:
        return
    with tempfile.TemporaryDirectory() as directory:
        command = [str(SCRIPTS / study["script"])]
        for name, value in {**SHARED_FLAGS, **flags}.items():
            command += [f"--{name}", os.path.expandvars(str(value))]
        print(f"{study['name']} {contender} {phase} {point} seed {flags['seed']}", flush=True)
        result = subprocess.run(
            [sys.executable, *command, "--output_dir", directory, "--disable_tqdm", "true"],
            capture_output=True,
            text=True,
            check=False,
        )
        record: dict[str, Any] = {"point": point, "value": None}
        if result.returncode == 0:
            written = json.loads((Path(directory) / "results.json").read_text())
            record |= {name: written[name] for name in ("results", "versions", "device", "threads", "peak_memory_gib")}
            record["value"] = written["results"]["selection_value"]
            record["metric"] = written["results"]["selection_metric"]
        else:
            record["error"] = result.stderr.strip().splitlines()[-1:]
        shown = f"{record['value']:.4f}" if record["value"] is not None else f"failed: {record['error']}"
        print(f"  -> {shown}", flush=True)
    log.add(key, record)


def best_point(runs: list[dict[str, Any]], contender: str, grid: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The point of the grid that is best on the held-out part: with the lowest loss, or the highest other metric."""
    if len(grid) == 1:
        return grid[0]
    sign = -1 if metric.endswith("loss") else 1
    tuned = [run for run in runs if run["key"]["contender"] == contender and run["key"]["phase"] == "tuning"]
    values = {json.dumps(run["point"]): sign * run["results"][metric] for run in tuned if run["value"] is not None}
    values = {point: value for point, value in values.items() if math.isfinite(value)}
    if not values:
        raise RuntimeError(f"every tuning run of {contender} failed; its last error: {tuned[-1].get('error')}")
    return max((point for point in grid if json.dumps(point) in values), key=lambda point: values[json.dumps(point)])


def summarize(study: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, seconds per epoch and tuning values of each contender."""
    summary = {}
    for contender in study["contenders"]:
        mine = [run for run in runs if run["key"]["contender"] == contender]
        final = [run for run in mine if run["key"]["phase"] == "final" and run["value"] is not None]
        tuning = [run for run in mine if run["key"]["phase"] == "tuning"]
        if not final:
            continue
        values = [run["value"] for run in final]
        epochs = study["flags"].get("num_train_epochs", 3)
        summary[contender] = {
            "point": final[0]["point"],
            "values": values,
            "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "seconds_per_epoch": statistics.mean(run["results"]["train_runtime"] / epochs for run in final),
            "peak_memory_gib": max(run["peak_memory_gib"] for run in final),
            "metric": final[0]["metric"],
            "tuning": [(run["point"], run.get("results", {}).get(study["tuning"]["metric"])) for run in tuning],
        }
    return summary


def format_table(study: dict[str, Any], summary: dict[str, Any]) -> str:
    """The summary as Markdown."""
    tuned = any(row["tuning"] for row in summary.values())
    lines = [
        f"# {study['name']}",
        "",
        f"`{study['script']}` with {', '.join(f'{k}={v}' for k, v in study['flags'].items())}; "
        f"seeds {study['seeds']}.",
        f"Tuned with one run per point (seed {study['tuning']['seed']}) on a held-out "
        f"{study['tuning']['holdout_fraction']:g} of the training split, by {study['tuning']['metric']}"
        f"{', with ' + str(study['tuning']['flags']) if study['tuning']['flags'] else ''}; "
        "the first table is on the evaluation split."
        if tuned
        else "Nothing was tuned: each grid has one point.",
        "",
        "| optimizer | chosen | metric | mean ± std | each seed | s / epoch | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in summary.items():
        values = ", ".join(f"{100 * v:.2f}" if abs(v) <= 1 else f"{v:.2f}" for v in row["values"])
        scale = 100 if abs(row["mean"]) <= 1 else 1
        chosen = ", ".join(f"{k} {v}" for k, v in row["point"].items())
        lines.append(
            f"| {name} | {chosen} | {row['metric'].removeprefix('eval_')} | {scale * row['mean']:.2f} ± "
            f"{scale * row['std']:.2f} | {values} | {row['seconds_per_epoch']:.0f} | {row['peak_memory_gib']:.2f} |"
        )
    if tuned:
        lines += ["", "| optimizer | tuning point | held-out value |", "| --- | --- | --- |"]
    for name, row in summary.items():
        for point, value in row["tuning"]:
            shown = "failed" if value is None else f"{value:.4f}"
            lines.append(f"| {name} | {', '.join(f'{k} {v}' for k, v in point.items())} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
