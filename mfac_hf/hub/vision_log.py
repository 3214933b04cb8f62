"""Read the log (``PREFIX.json``) of ``scripts/train_vision.py`` and ``prune_vision.py`` for a card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfac_hf.hub.errors import MissingResultsError
from mfac_hf.hub_names import VISION

__all__ = ["read_log"]

SAME_SPARSITY = 1e-3  # the steps of a schedule lie further apart


def read_log(record: Mapping[str, Any], name: str, sparsity: float | None) -> dict[str, Any]:
    """Read the log of a vision run, which has a row for the beginning, each pruning step and each epoch.

    Args:
        record: content of the log, in the form of `mfac_hf.hub.schemas.VisionLog`.
        name: name of the file, for errors.
        sparsity: sparsity of the weights; the last row of this sparsity counts, or with None the last of all.

    Returns:
        What `mfac_hf.hub.run_records.read_run` returns, but for what every run records.

    Raises:
        MissingResultsError: no row has that sparsity and an accuracy.
    """
    arguments = record.get("arguments", {})
    rows = [row for row in record["rows"] if "accuracy" in row]
    if sparsity is not None:
        rows = [row for row in rows if abs(row.get("sparsity", 0.0) - sparsity) < SAME_SPARSITY]
    if not rows:
        seen = sorted({round(row.get("sparsity", 0.0), 4) for row in record["rows"]})
        raise MissingResultsError(
            f"{name} lacks an accuracy at sparsity {sparsity}, that of the weights; it has {seen}"
        )
    row = rows[-1]
    # a pruning step saves the model after its batch norms were re-estimated
    anew = row.get("event") == "prune" and arguments.get("reestimate_bn") in ("after", "both")
    if (accuracy := row.get("accuracy_bn" if anew else "accuracy")) is None:
        raise MissingResultsError(f"{name} lacks accuracy_bn in its row of sparsity {row.get('sparsity')}")
    return {
        "task": "image-classification",
        "split": "test",
        "metrics": {"accuracy": accuracy},
        "dataset": _vision_dataset(str(arguments.get("dataset"))),
        "base_model": arguments.get("checkpoint"),
        "optimizer": _vision_optimizer(arguments),
        "training": {
            key: arguments[key]
            for key in ("nepochs", "batchsize", "prun_lrs", "drop_at", "drop_by", "train_images", "normalization")
            if arguments.get(key) is not None
        },
        "pruning": _vision_pruning(arguments, record["rows"], row),
        "dense_metrics": _dense_metrics(record["rows"][0]),
        "seed": arguments.get("seed"),
        **({} if arguments.get("checkpoint") is None else {"base_model_is_local": True}),  # a file
    }


def _dense_metrics(first: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the metrics before pruning, where the log begins with them."""
    return {"accuracy": first["accuracy"]} if first.get("event") == "initial" and "accuracy" in first else None


def _vision_dataset(source: str) -> dict[str, Any]:
    """Name the data set: a folder called like a known one is taken for a copy, any other has its own name."""
    name = Path(source).name
    return {"id": VISION.get(name, name), "source": source}


def _vision_optimizer(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    names = {"mfac": "M-FAC", "sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
    if arguments.get("optim") not in names:
        return None
    settings = ["lr", "momentum", "weightdecay"]
    if arguments["optim"] == "mfac":
        settings += ["metric", "ngrads", "damping", "nesterov", "grad_decay", "normalize", "window_dtype"]
        arguments = {"metric": "identity", **arguments}  # runs from before there was another one do not name it
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
            damping = {"damping": row["damping"]} if row.get("damping") else {}  # older logs have none
            steps.append({"at": f"after {epochs} epochs", "sparsity": row.get("sparsity", 0.0), **damping})
    # Logs without it are older than the scaled Fisher.
    fisher = {"fisher": arguments.get("fisher", "empirical")} if arguments.get("pruner") == "mfac" else {}
    options = fisher | {key: arguments.get(key) for key in (*keys, "pattern", "scope", "reestimate_bn")}
    if options["prundamp"] is None:  # the steps tell
        del options["prundamp"]
    return {
        "options": options,
        "steps": steps,
    }
