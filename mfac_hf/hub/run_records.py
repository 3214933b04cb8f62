"""Result files of runs: `write_results` writes one, and `read_run` reads every kind into the form that cards need.

The kinds are the ``results.json`` of ``scripts/run_glue.py`` and ``run_squad.py``, which `write_results` writes, and
the log (``PREFIX.json``) of ``scripts/train_vision.py`` and ``prune_vision.py``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mfac_hf.hub_names import GLUE, SQUAD, VISION
from mfac_hf.machine import describe_run, relative_paths

__all__ = ["MissingResultsError", "metrics_of", "pruning_facts", "read_run", "write_results"]

# Trainer's evaluation reports these beside metrics.
_NO_METRICS = (
    *("loss", "runtime", "samples_per_second", "steps_per_second"),
    *("model_preparation_time", "jit_compilation_time"),
)
TRAINING_SETTINGS = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "fp16"),
)
_DATA = ("max_seq_length", "doc_stride", "max_train_samples", "max_eval_samples")
# Flags of gradual pruning, `mfac_hf.training.pruning_arguments.GradualArguments`.
SCHEDULE_SETTINGS = (
    *("prune_schedule", "initial_sparsity", "prune_start", "prune_end", "prune_every", "prune_unit"),
    *("prune_gradients", "prune_lr_cycle", "prune_evaluate"),
    *("distillation_hardness", "distillation_temperature", "teacher_name_or_path"),
)
_COMMON = ("command", "versions", "device", "threads", "wall_seconds", "peak_memory_gib")
_NEEDED = ("metrics", "seed", "command", "versions", "device", "optimizer")
UNTRAINED = "none (pruned without training)"
SAME_SPARSITY = 1e-3  # the steps of a schedule lie further apart


class MissingResultsError(ValueError):
    """The result files lack something that a card has to say."""


def read_run(
    source: str | os.PathLike[str] | Mapping[str, Any], *, sparsity: float | None = None, strict: bool = True
) -> dict[str, Any]:
    """Read one result file.

    Args:
        source: the file, its content, or what this function returned for it.
        sparsity: sparsity of the weights that the card describes. A vision log has a row for each step of a run; the
            last row of this sparsity counts, or with None the last of all.
        strict: whether the file has to have metrics.

    Returns:
        Plain JSON types: ``task``, ``split``, ``metrics`` by name, ``dataset``, ``base_model``, ``optimizer``
        (``name`` and settings), ``training``, ``pruning``, ``dense_metrics`` (before pruning), ``seed``, ``command``,
        ``versions``, ``device``, ``threads``, ``wall_seconds``, ``peak_memory_gib``; None where unknown.

    Raises:
        FileNotFoundError: there is no such file.
        MissingResultsError: the file lacks results that a card needs; the message names them.
        ValueError: the file is no JSON object.
    """
    name = "the given record" if isinstance(source, Mapping) else str(source)
    record: Any = source
    if not isinstance(source, Mapping):
        try:
            record = json.loads(Path(source).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is no JSON file: {error}") from error
    if not isinstance(record, Mapping):
        raise ValueError(f"{name} holds a {type(record).__name__}; expected an object, as the scripts write it")
    if "metrics" in record:
        run = dict(record)  # read before
    else:
        run = _from_log(record, name, sparsity) if "rows" in record else _from_results(record)
        run |= {key: record.get(key) for key in _COMMON}
    lacking = [key for key in _NEEDED if run.get(key) in (None, {}, []) and (strict or key != "metrics")]
    if lacking:
        raise MissingResultsError(
            f"{name} lacks {', '.join(lacking)}; a card says only what was measured. Run the script with --do_eval, "
            "and pass the result file that it writes"
        )
    return run


def metrics_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics among Trainer's evaluation results, without the prefix ``eval_``."""
    return {
        key.removeprefix("eval_"): value
        for key, value in results.items()
        if key.startswith("eval_") and isinstance(value, int | float) and not key.endswith(_NO_METRICS)
    }


def _from_results(record: Mapping[str, Any]) -> dict[str, Any]:
    """Read the ``results.json`` of a run with Trainer."""
    results = record.get("results", {})
    # Flags are told by name alone: no two of a script's dataclasses may share one.
    flags = {name: value for group in record.get("arguments", {}).values() for name, value in group.items()}
    task, splits = results.get("task"), results.get("evaluated_on", [])
    dataset = {"id": SQUAD.get(str(task), GLUE), "source": flags.get("dataset_name")}
    if task not in SQUAD:
        dataset["config"] = flags.get("task_name")
    return {
        "task": task,
        "split": ", ".join([splits] if isinstance(splits, str) else splits),
        "metrics": metrics_of(results),
        "dataset": dataset if "dataset_name" in flags else record.get("dataset"),
        "base_model": flags.get("model_name_or_path") or record.get("base_model"),
        "optimizer": record.get("optimizer") or _optimizer(flags),
        "training": {
            key: flags[key]
            for key in TRAINING_SETTINGS
            if flags.get(key) not in (None, False, -1) and flags.get("num_train_epochs") != 0
        }
        | {key: flags[key] for key in _DATA if flags.get(key) is not None},
        "pruning": pruning_facts((results.get("pruning") or {}).get("reports", []), flags),
        "dense_metrics": metrics_of(results.get("before_pruning") or {}) or None,
        "seed": record.get("seed"),
    }


def pruning_facts(
    reports: Sequence[Mapping[str, Any]], flags: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Gather what a card says of pruning steps; None without steps.

    Args:
        reports: ``PruningReport.to_dict()`` of each step.
        flags: flags of the run; those of gradual pruning count if the steps were part of a training.
    """
    if not reports:
        return None
    hidden = ("loss_samples", "memory_budget", "damping") if reports[-1]["options"].get("damping") == "auto" else ()
    schedule: dict[str, Any] = {}
    if flags and flags.get("prune_end") is not None:  # else pruned in one go: these flags had no part in it
        schedule = {key: flags[key] for key in SCHEDULE_SETTINGS if flags.get(key) not in (None, False)}
    options = {key: value for key, value in reports[-1]["options"].items() if key not in hidden and value is not None}
    options = {**schedule, **options}
    shown = ("position", "sparsity", "num_grads", "loss_before", "loss_after", "seconds")
    steps = []
    for number, report in enumerate(reports, start=1):
        step = {"step": number, **{key: report[key] for key in shown if report.get(key) is not None}}
        dampings = {part["damping"] for part in report.get("steps", []) if part.get("damping") is not None}
        if len(dampings) > 0:
            step["damping"] = sorted(dampings)
        steps.append(step)
    return {"options": options, "steps": steps}


def _optimizer(flags: Mapping[str, Any]) -> dict[str, Any] | None:
    """Name the optimizer that ran; ``optim`` of TrainingArguments names another one."""
    if "optim_name" not in flags:
        return None
    if flags.get("num_train_epochs") == 0:
        return {"name": UNTRAINED}
    if flags["optim_name"] == "adamw":
        return {"name": "AdamW", **{key: flags.get(key) for key in ("adam_beta1", "adam_beta2", "adam_epsilon")}}
    shown = ("num_grads", "damping", "momentum", "grad_decay", "normalize", "window_dtype", "decoupled_weight_decay")
    return {"name": "M-FAC", **{key: flags[key] for key in shown if key in flags}}


def _from_log(record: Mapping[str, Any], name: str, sparsity: float | None) -> dict[str, Any]:
    """Read the log of a vision run, which has a row for the beginning, each pruning step and each epoch."""
    arguments = record.get("arguments", {})
    rows = [row for row in record["rows"] if "accuracy" in row]
    if sparsity is not None:
        rows = [row for row in rows if abs(row.get("sparsity", 0.0) - sparsity) < SAME_SPARSITY]
    if not rows:
        seen = sorted({round(row.get("sparsity", 0.0), 4) for row in record["rows"]})
        raise MissingResultsError(
            f"{name} lacks an accuracy at sparsity {sparsity}, that of the weights; it has {seen}"
        )
    row, first = rows[-1], record["rows"][0]
    # a pruning step saves the model after its batch norms were re-estimated
    anew = row.get("event") == "prune" and arguments.get("reestimate_bn") in ("after", "both")
    return {
        "task": "image-classification",
        "split": "test",
        "metrics": {"accuracy": row["accuracy_bn" if anew else "accuracy"]},
        "dataset": _vision_dataset(str(arguments.get("dataset"))),
        "base_model": arguments.get("checkpoint"),
        "optimizer": _vision_optimizer(arguments),
        "training": {
            key: arguments[key]
            for key in ("nepochs", "batchsize", "prun_lrs", "drop_at", "drop_by", "train_images", "normalization")
            if arguments.get(key) is not None
        },
        "pruning": _vision_pruning(arguments, record["rows"], row),
        "dense_metrics": {"accuracy": first["accuracy"]} if first.get("event") == "initial" else None,
        "seed": arguments.get("seed"),
    }


def _vision_dataset(source: str) -> dict[str, Any]:
    """Name the data set: a folder called like a known one is taken for a copy, any other has its own name."""
    name = Path(source).name
    return {"id": VISION.get(name, name), "source": source}


def _vision_optimizer(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    names = {"mfac": "M-FAC", "sgd": "SGD", "adam": "Adam"}
    if arguments.get("optim") not in names:
        return None
    settings = ["lr", "momentum", "weightdecay"]
    if arguments["optim"] == "mfac":
        settings += ["ngrads", "damping", "grad_decay", "normalize", "window_dtype"]
    chosen = {key: arguments[key] for key in settings if arguments.get(key) is not None}
    return {"name": names[arguments["optim"]], **chosen}


def _vision_pruning(
    arguments: Mapping[str, Any], rows: list[dict[str, Any]], last: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Tell how the model of row ``last`` was pruned."""
    if not arguments.get("sparsities"):
        return None
    keys = ("pruner", "ngrads_schedule", "prun_batchsize", "blocksize", "prundamp", "nrecomps", "selection", "update")
    until = rows[: 1 + next(index for index, row in enumerate(rows) if row is last)]
    epochs = 0
    steps = []
    for row in until:
        epochs += row.get("event") == "epoch"
        if row.get("event") == "prune":
            steps.append({"at": f"after {epochs} epochs", "sparsity": row["sparsity"]})
    return {
        "options": {key: arguments.get(key) for key in (*keys, "pattern", "scope", "reestimate_bn")},
        "steps": steps,
    }


def write_results(
    output_dir: str | os.PathLike[str],
    results: Mapping[str, Any],
    *,
    arguments: Iterable[Any],
    argv: Sequence[str] | None,
    started: float,
) -> Path:
    """Write ``results.json``: what a run measured, and what it takes to measure it again.

    The latter are the command line, effective arguments, seeds, package versions, device, wall time and peak memory.
    Absolute paths are written relative to the working directory.

    Args:
        output_dir: directory of the file; made if missing.
        results: metrics by name.
        arguments: the dataclass instances that ``parse_args`` returned, ``TrainingArguments`` among them.
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.
        started: ``time.perf_counter()`` at the start of the run.

    Returns:
        The path of the file.
    """
    from transformers import TrainingArguments  # here: reading a file need not wait for it

    arguments = list(arguments)
    training_args = next(a for a in arguments if isinstance(a, TrainingArguments))
    record = {
        "results": dict(results),
        "arguments": {
            type(a).__name__: relative_paths(
                a.to_dict() if isinstance(a, TrainingArguments) else dataclasses.asdict(a)
            )
            for a in arguments
        },
        "seed": training_args.seed,
        "data_seed": training_args.data_seed,
        **describe_run(argv, training_args.device),
        "wall_seconds": round(time.perf_counter() - started, 2),
    }
    path = Path(output_dir) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
