"""Compare optimizers on one task with equal tuning: ``python scripts/compare_optimizers.py STUDY.yaml``.

A study names a training script, the flags that all runs share, and for each contender a grid of flags:

    name: sst2-bert-tiny
    script: run_glue.py
    flags: {model_name_or_path: MODEL, dataset_name: DATA, task_name: sst2, num_train_epochs: 2}
    seeds: [1, 2, 3]
    tuning: {holdout_fraction: 0.1, seed: 0}
    baseline: adamw
    contenders:
      adamw: {flags: {optim_name: adamw, warmup_steps: 0.1}, grid: [{learning_rate: 1e-4}, {learning_rate: 3e-4}]}
      mfac, drop-in: {flags: {optim_name: mfac}, take: {from: adamw, flags: [learning_rate, warmup_steps]}}
      mfac, tuned: {flags: {optim_name: mfac, warmup_steps: 0.1}, grid: [{learning_rate: 1e-3}, {learning_rate: 3e-3}]}

Every point of every grid is trained once without a held-out part of the *training* split and judged on that part, by
the task's own metric or by ``tuning: {metric: eval_loss}``. ``tuning: {flags: {...}}`` makes these runs shorter for
all contenders alike; ``tuning_flags: {...}`` of a contender changes them for it alone. The best point of each
contender is then trained with every seed and judged on the validation split, which no run before has seen. A grid of
one point is not tuned. ``take`` gives a contender the values that another one was tuned to; with ``study: NAME`` those
of the finished study NAME, with ``scale: {learning_rate: 2}`` twice the value. The flag ``contender: soap`` stands for
an optimizer of another package (`run_contender.py`).

With a ``baseline`` the table says how many steps and CPU seconds each contender needs to the baseline's last training
loss. Each run is a process of its own with one thread, unless OMP_NUM_THREADS says otherwise. ``OUTPUT/NAME.jsonl``
keeps finished runs, with their flags and loss curves, and they are not repeated, so a study that was cut off goes on
where it stopped (``log: OTHER`` shares the runs of another study). ``OUTPUT/NAME.md`` has the tables. ``base: FILE``
lets a study begin with what another one says.

``--summary STUDY...`` runs nothing, and puts the finished runs of several studies into one table: what AdamW, M-FAC
with AdamW's values and M-FAC tuned reach on each task.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from comparison.runs import MissingRunsError, StudyRuns
from comparison.study_file import load_study
from comparison.summary import format_summary
from comparison.tables import format_study, summarize

from mfac_hf.machine import package_version
from mfac_hf.storage import write_text
from mfac_hf.training.study import StudyLog, UnsetVariableError, expand_variables, study_parser

SCRIPTS = Path(__file__).parent
SHARED_FLAGS = {
    "do_train": True,
    "do_eval": True,
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "logging_steps": 0.01,  # of the run: the resolution of its curve
    "logging_nan_inf_filter": False,  # a diverging run must look like one
    "disable_tqdm": True,
    "output_dir": "{output}",
}
# The script for vision models has flags of its own.
VISION_FLAGS = {"progress": False, "save": "{output}/model.pth", "results": "{output}/results.json"}


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = study_parser(__doc__)
    parser.add_argument("study", type=Path, nargs="?", help="YAML file of the study")
    parser.add_argument("--only", nargs="+", default=None, help="contenders to run now (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="seeds to run now (default: all)")
    parser.add_argument("--summary", type=Path, nargs="+", default=None, help="studies to put into one table")
    parser.add_argument("--summary_name", default="drop-in", help="name of that table's file (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what the study still lacks, write its tables, and return its summary; or sum up several studies."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if (args.study is None) == (args.summary is None):
        parser.error("give one study to run, or --summary and the studies to put into one table")
    try:
        if args.summary is not None:
            return sum_up([load_study(path) for path in args.summary], args.output, args.summary_name)
        study = load_study(args.study)
        for name in ("only", "seeds"):
            known = study["contenders"] if name == "only" else study["seeds"]
            if unknown := [str(one) for one in getattr(args, name) or [] if one not in known]:
                raise ValueError(f"--{name} {', '.join(unknown)}: the study has {'; '.join(map(str, known))}")
        runs = StudyRuns(study, args.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for contender in args.only or study["contenders"]:
        try:
            run_contender(runs, contender, args.seeds or study["seeds"])
        except (MissingRunsError, UnsetVariableError) as error:
            parser.error(str(error))
    summary = summarize(runs)
    table = format_study(study, summary)
    write_text(args.output / f"{study['name']}.md", table)
    print(table)
    return summary


def sum_up(studies: list[dict[str, Any]], folder: Path, name: str) -> dict[str, Any]:
    """Write the table of several studies, and return their summaries by name."""
    summaries = {study["name"]: summarize(StudyRuns(study, folder)) for study in studies}
    table = format_summary(studies, summaries, name)
    write_text(folder / f"{name}.md", table)
    print(table)
    return summaries


def run_contender(runs: StudyRuns, contender: str, seeds: list[int]) -> None:
    """Tune one contender and train it with these seeds, as far as that was not done."""
    for point in runs.points(contender):
        run_once(runs.study, contender, "tuning", point, runs.tuning_flags(contender, point), runs.log)
    best = runs.best_point(contender)
    for seed in seeds:
        run_once(runs.study, contender, "final", best, runs.final_flags(contender, seed), runs.log)


def run_once(
    study: dict[str, Any], contender: str, phase: str, point: dict[str, Any], flags: dict[str, Any], log: StudyLog
) -> None:
    """Train and evaluate once, unless the log has this very run; a run that fails counts as the worst result."""
    key = {"contender": contender, "phase": phase, "flags": flags}
    if log.find(**key) is not None:
        return
    with tempfile.TemporaryDirectory() as directory:
        command = [str(SCRIPTS / study["script"])]
        if "contender" in flags:
            command = [str(SCRIPTS / "run_contender.py"), study["script"]]
        shared = VISION_FLAGS if study["script"] == "train_vision.py" else SHARED_FLAGS
        for name, value in {**shared, **flags}.items():
            text = json.dumps(value) if isinstance(value, dict) else str(value).replace("{output}", directory)
            command += [f"--{name}", expand_variables(text)]
        print(f"{study['name']} {contender} {phase} {point} seed {flags['seed']}", flush=True)
        result = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            check=False,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        record: dict[str, Any] = {"point": point, "value": None}
        if result.returncode == 0:
            written = json.loads((Path(directory) / "results.json").read_text())
            record |= {name: written[name] for name in ("results", "versions", "device", "threads", "peak_memory_gib")}
            record["value"] = written["results"]["selection_value"]
            record["metric"] = written["results"]["selection_metric"]
            if "contender" in flags:
                record["versions"]["pytorch_optimizer"] = package_version("pytorch_optimizer")
        else:
            record["error"] = result.stderr.strip().splitlines()[-1:]
        shown = f"{record['value']:.4f}" if record["value"] is not None else f"failed: {record['error']}"
        print(f"  -> {shown}", flush=True)
    log.add(key, record)


if __name__ == "__main__":
    main()
