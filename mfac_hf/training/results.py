"""The result file of a training run: what was measured, and what it takes to measure it again."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

_PACKAGES = "mfac_hf torch transformers datasets accelerate evaluate numpy scipy scikit-learn".split()


def write_results(
    output_dir: str | os.PathLike[str],
    results: Mapping[str, Any],
    *,
    arguments: Iterable[Any],
    argv: Sequence[str] | None,
    started: float,
) -> Path:
    """Write ``results.json``: what was measured, and what it takes to measure it again.

    Beside the results: command line, effective arguments, seeds, package versions, device, wall time and peak
    memory. Absolute paths are written relative to the working directory.

    Args:
        output_dir: Where the file goes; made if missing.
        results: Metrics by name.
        arguments: The dataclass instances that ``parse_args`` returned, ``TrainingArguments`` among them.
        argv: Arguments without the program's name; ``sys.argv[1:]`` if None.
        started: ``time.perf_counter()`` at the start of the run.

    Returns:
        The path of the file.
    """
    arguments = list(arguments)
    training_args = next(a for a in arguments if isinstance(a, TrainingArguments))
    record = {
        "results": dict(results),
        "arguments": {
            type(a).__name__: _relative(a.to_dict() if isinstance(a, TrainingArguments) else dataclasses.asdict(a))
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


def describe_run(argv: Sequence[str] | None, device: torch.device) -> dict[str, Any]:
    """What it takes to repeat a run, and the memory that it took so far.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.
        device: the device that the run computes on.

    Returns:
        Command line, package versions, device, threads and peak memory, as plain JSON types.
    """
    record = {
        "command": _relative(_without_tokens([sys.argv[0], *(sys.argv[1:] if argv is None else argv)])),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "device": _device(device),
        "threads": torch.get_num_threads(),
        "peak_memory_gib": round(peak_memory() / 2**30, 3),
    }
    if device.type == "cuda":
        record["peak_device_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return record


def _relative(value: Any) -> Any:
    """Rewrite absolute paths inside a JSON-like value relative to the working directory."""
    if isinstance(value, dict):
        return {key: _relative(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_relative(item) for item in value]
    if isinstance(value, str) and value.startswith("--") and "=" in value:
        flag, path = value.split("=", 1)
        return f"{flag}={_relative(path)}"
    return os.path.relpath(value) if isinstance(value, str) and os.path.isabs(value) else value


def _without_tokens(command: Sequence[str]) -> list[str]:
    """Blank the value of every ``--…token`` flag: a result file is made to be shared."""
    blanked, secret = [], False
    for word in command:
        name, equals, _ = word.partition("=")
        blanked.append("..." if secret else name + "=..." if equals and name.endswith("token") else word)
        secret = not equals and name.startswith("--") and name.endswith("token")
    return blanked


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})"


def peak_memory() -> int:
    """Most bytes of memory that this process has held at once."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:  # no Linux
        # macOS counts bytes, others kilobytes
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    # Not getrusage: there a process begins with the peak of the one that started it.
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
