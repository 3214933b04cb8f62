"""Result files of runs: `write_results` writes one, and `read_run` reads every kind into the form that cards need.

The kinds are the ``results.json`` of ``scripts/run_glue.py`` and ``run_squad.py``, which `write_results` writes, the
``pruning.json`` of `mfac prune`, and the log (``PREFIX.json``) of ``scripts/train_vision.py`` and ``prune_vision.py``.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mfac_hf.defaults import MFAC_DEFAULTS
from mfac_hf.hub.errors import MissingResultsError
from mfac_hf.hub.schemas import PrunedFile, ResultsFile, Run, VisionLog
from mfac_hf.hub.vision_log import read_log
from mfac_hf.hub_names import GLUE, SQUAD
from mfac_hf.machine import describe_run, relative_paths
from mfac_hf.schema import check_schema
from mfac_hf.storage import read_json, write_json

__all__ = [
    "MissingResultsError",
    "metrics_of",
    "perplexities",
    "pruning_facts",
    "read_run",
    "used_settings",
    "write_results",
]

# Trainer's evaluation reports these beside metrics.
_NO_METRICS = (
    *("loss", "runtime", "samples_per_second", "steps_per_second"),
    *("model_preparation_time", "jit_compilation_time"),
)
_TRAINING_SETTINGS = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "n_gpu", "gradient_accumulation_steps"),
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
# Records have these where there was something to say.
_SOMETIMES = ("ranks", "launcher")
_NEEDED = ("metrics", "seed", "command", "versions", "device", "optimizer")
_EMPTY: dict[str, Any] = {
    **{"task": None, "split": None, "metrics": {}, "dataset": None, "base_model": None, "training": {}},
    **{"pruning": None, "dense_metrics": None},
}
PARAMETERS = ("trainable_parameters", "total_parameters")  # of a model with an adapter
_MAX_EXPONENT = 700  # exp of more is no double
UNTRAINED = "none (pruned without training)"
NOT_TRAINED = "none: the model was not trained in this run"


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
        ValueError: the file is no JSON object, or one of another form, or a metric is no finite number.
    """
    name = "the given record" if isinstance(source, Mapping) else str(source)
    record: Any = source if isinstance(source, Mapping) else read_json(source)
    if not isinstance(record, Mapping):
        raise ValueError(f"{name} holds a {type(record).__name__}; expected an object, as the scripts write it")
    run = _read(record, name, sparsity)
    lacking = [key for key in _NEEDED if run.get(key) in (None, {}, []) and (strict or key != "metrics")]
    if lacking:
        again = "prune again without --no-eval" if _is_pruned(record) else "run the script with --do_eval"
        raise MissingResultsError(
            f"{name} lacks {', '.join(lacking)}; a card says only what was measured: {again} (scripts/run_glue.py, "
            "scripts/run_squad.py, mfac prune), and pass the result file that it writes"
        )
    check_schema(run, Run, name)
    for title, metrics in (("", run["metrics"]), ("before pruning, ", run["dense_metrics"] or {})):
        for metric, value in metrics.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{name}: {title}{metric} is {value}; a card takes finite metrics only. The run diverged: repeat "
                    "it with a smaller learning rate or a larger damping"
                )
    return run


def _is_pruned(record: Mapping[str, Any]) -> bool:
    """Whether this is the content of a ``pruning.json``."""
    return "before" in record and "after" in record


def _read(record: Mapping[str, Any], name: str, sparsity: float | None) -> dict[str, Any]:
    """Read a record of any kind, after a check of its form."""
    if "metrics" in record:  # read before
        return dict(record) | {key: value for key, value in _EMPTY.items() if key not in record}
    if "rows" in record:
        check_schema(record, VisionLog, name)
        run = read_log(record, name, sparsity)
    elif _is_pruned(record):
        check_schema(record, PrunedFile, name)
        run = _from_pruned(record)
    else:
        check_schema(record, ResultsFile, name)
        run = _from_results(record)
    return run | {key: record.get(key) for key in _COMMON} | {key: record[key] for key in _SOMETIMES if key in record}


def metrics_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics among Trainer's evaluation results, without the prefix ``eval_``; the loss if it is alone."""
    numbers = _numbers(results)
    metrics = {key: value for key, value in numbers.items() if not key.endswith(_NO_METRICS)}
    return metrics or {key: value for key, value in numbers.items() if key.endswith("loss")}


def perplexities(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the losses among Trainer's evaluation results of a language model, and ``exp(loss)`` of each."""
    found: dict[str, float] = {}
    for key, value in _numbers(results).items():
        if key.endswith("loss"):
            found[key] = value
            if value < _MAX_EXPONENT:
                found[f"{key.removesuffix('loss')}perplexity"] = math.exp(value)
    return found


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among Trainer's evaluation results by their names without ``eval_``."""
    return {
        key.removeprefix("eval_"): value
        for key, value in results.items()
        if key.startswith("eval_") and isinstance(value, int | float) and not isinstance(value, bool)
    }


def used_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Choose from TrainingArguments' values those that a card tells: what was set and had a part in the training."""
    used = {key: values[key] for key in _TRAINING_SETTINGS if values.get(key) not in (None, False, -1)}
    if used.get("n_gpu") == 1:
        del used["n_gpu"]
    if "max_steps" in used:
        used.pop("num_train_epochs", None)  # the steps decide
    return used


def _from_results(record: Mapping[str, Any]) -> dict[str, Any]:
    """Read the ``results.json`` of a run with Trainer."""
    results = record.get("results", {})
    # Flags are told by name alone: no two of a script's dataclasses may share one.
    flags = {name: value for group in record.get("arguments", {}).values() for name, value in group.items()}
    task, splits = results.get("task"), results.get("evaluated_on", [])
    dataset = _task_dataset(task, flags.get("task_name"), flags.get("dataset_name"))
    optimizer = record.get("optimizer") or _optimizer(flags)
    if flags.get("do_eval") and not flags.get("do_train") and not any(key.startswith("train_") for key in results):
        optimizer = {"name": NOT_TRAINED}
    trained = flags.get("num_train_epochs") != 0 and (optimizer or {}).get("name") != NOT_TRAINED
    return {
        "task": task,
        "split": ", ".join([splits] if isinstance(splits, str) else splits),
        "metrics": metrics_of(results),
        "dataset": dataset if "dataset_name" in flags else record.get("dataset"),
        "base_model": flags.get("model_name_or_path") or record.get("base_model"),
        "optimizer": optimizer,
        "training": (used_settings(flags) if trained else {}) | _data_settings(flags),
        "pruning": pruning_facts((results.get("pruning") or {}).get("reports", []), flags),
        "dense_metrics": metrics_of(results.get("before_pruning") or {}) or None,
        "seed": record.get("seed"),
        **({"base_model_is_local": True} if record.get("base_model_is_local") else {}),
        **({"parameters": {key: lora[key] for key in PARAMETERS}} if (lora := results.get("lora")) else {}),
    }


def _from_pruned(record: Mapping[str, Any]) -> dict[str, Any]:
    """Read the ``pruning.json`` of `mfac prune`."""
    data, task = record.get("data", {}), record.get("task")
    report = record.get("pruning")
    return {
        "task": task,
        "split": record.get("evaluated_on"),
        "metrics": metrics_of(record["after"] or {}),
        "dataset": _task_dataset(task, task, data.get("dataset")),
        "base_model": record.get("model"),
        "optimizer": {"name": UNTRAINED},
        "training": _data_settings(data),
        "pruning": pruning_facts([report] if report else []),
        "dense_metrics": metrics_of(record["before"] or {}) or None,
        "seed": record.get("seed"),
        **({"base_model_is_local": True} if record.get("model_is_local") else {}),
    }


def _task_dataset(task: str | None, config: str | None, source: str | None) -> dict[str, Any]:
    """Name the data set of a task of GLUE or SQuAD."""
    dataset = {"id": SQUAD.get(str(task), GLUE), "source": source}
    return dataset if task in SQUAD else {**dataset, "config": config}


def _data_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {key: flags[key] for key in _DATA if flags.get(key) is not None}


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
    told = dict(reports[-1]["options"])
    if told.get("method") == "mfac":
        told.setdefault("fisher", "empirical")  # reports without it are older than the scaled one
    hidden = {"loss_samples", "memory_budget", "damping"} if told.get("damping") == "auto" else set()
    hidden |= {"fisher_floor"} if told.get("fisher") != "scaled" else set()
    hidden |= {"fisher", "fisher_floor"} if told.get("method") == "magnitude" else set()
    schedule: dict[str, Any] = {}
    if flags and flags.get("prune_end") is not None:  # else pruned in one go: these flags had no part in it
        schedule = {key: flags[key] for key in SCHEDULE_SETTINGS if flags.get(key) not in (None, False)}
    options = {key: value for key, value in told.items() if key not in hidden and value is not None}
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
    metric = flags.get("metric") or "identity"  # runs from before there was another one do not name theirs
    shown = ["num_grads", "damping", "nesterov", "momentum", "grad_decay", "normalize", "window_dtype"]
    shown += ["decoupled_weight_decay"]
    defaults = MFAC_DEFAULTS[metric]
    options = {key: defaults.get(key) if flags[key] is None else flags[key] for key in shown if key in flags}
    if metric == "adam":
        options |= {key: flags[key] for key in ("adam_beta1", "adam_beta2", "adam_epsilon") if key in flags}
    return {"name": "M-FAC", "metric": metric, **{key: value for key, value in options.items() if value is not None}}


def write_results(
    output_dir: str | os.PathLike[str],
    results: Mapping[str, Any],
    *,
    arguments: Iterable[Any],
    argv: Sequence[str] | None,
    started: float,
) -> Path:
    """Write ``results.json``, whole or not at all: what a run measured, and what it takes to measure it again.

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
    base = next((name for a in arguments if (name := getattr(a, "model_name_or_path", None)) is not None), None)
    record: dict[str, Any] = {
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
    if base is not None and Path(base).exists():
        record["base_model_is_local"] = True  # readers elsewhere cannot tell it from a name on the Hub
    if training_args.n_gpu > 1:
        record["arguments"][type(training_args).__name__]["n_gpu"] = training_args.n_gpu  # no field of theirs
    path = Path(output_dir) / "results.json"
    write_json(path, record)
    return path
