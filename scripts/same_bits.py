"""Compare fixed-seed runs of a git revision with those of the working tree: ``python scripts/same_bits.py REVISION``.

The scenarios of ``scripts/scenarios/`` run twice, each time in a process of its own: on the package of REVISION, which
is checked out into a temporary worktree, and on the package of this working tree. Every tensor, file and text that
they return is compared by its hash. Exit status 1: something differs, is missing on one side, or a scenario failed.

    python scripts/same_bits.py HEAD
    python scripts/same_bits.py v0.1.0 --only optimizer sparse
    MFAC_NATIVE=off python scripts/same_bits.py HEAD        # the PyTorch implementations alone

Scenarios call public names only, so that they run on revisions with other private modules. Where the variable
MFAC_SHARED_DATA names a folder of real data, those on real models run too.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FAILED, NOT_RUN = "failed", "not run"  # what stands in place of the names of a scenario's values
SHOWN = 5  # differences of a scenario that are printed


def main(argv: Sequence[str] | None = None) -> int:
    """Run and compare; the exit status."""
    parser = argparse.ArgumentParser(description="Compare fixed-seed runs of a git revision with the working tree's.")
    parser.add_argument("revision", help="the git revision to compare with")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="scenarios whose names match")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # the child process: where to write
    arguments = parser.parse_args(argv)
    patterns = [f"*{pattern}*" for pattern in arguments.only]
    if arguments.record is not None:
        arguments.record.write_text(json.dumps(record(Path(arguments.revision), patterns)))
        return 0
    found = subprocess.run(
        [
            "git",
            "-C",
            str(ROOT),
            "rev-parse",
            "--verify",
            "--quiet",
            "--end-of-options",
            f"{arguments.revision}^{{commit}}",
        ],
        stdout=subprocess.DEVNULL,
    )
    if found.returncode:
        parser.error(f"revision {arguments.revision!r} is no commit of {ROOT}; give one that `git log` shows")
    with tempfile.TemporaryDirectory() as folder, worktree(arguments.revision, Path(folder)) as old:
        before, after = (run(root, Path(folder), arguments.only) for root in (old, ROOT))
    return report(before, after, arguments.revision)


@contextlib.contextmanager
def worktree(revision: str, folder: Path) -> Iterator[Path]:
    """A checkout of a revision that is gone afterwards."""
    path = folder / "revision"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(path), revision], check=True)
    try:
        yield path
    finally:
        subprocess.run([*git, "remove", "--force", str(path)], check=True)


def run(root: Path, folder: Path, only: Sequence[str]) -> dict[str, str]:
    """Digests by name of the scenarios on the package of ``root``, from a fresh process.

    The process works in ``folder``, where scenarios leave checkpoints for the run on the other package.
    """
    found = folder / "digests.json"
    command = [sys.executable, str(Path(__file__).resolve()), str(root), "--record", str(found), "--only", *only]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        raise RuntimeError(f"the scenarios on {root} ended with status {result.returncode}:\n{result.stderr[-4000:]}")
    return json.loads(found.read_text())


def record(root: Path, patterns: Sequence[str]) -> dict[str, str]:
    """Run the scenarios in this process."""
    from scenarios import SCENARIOS

    import mfac_hf

    if (taken := Path(mfac_hf.__file__).resolve().parents[1]) != root.resolve():
        raise RuntimeError(f"mfac_hf comes from {taken}; expected {root}")
    found: dict[str, str] = {}
    for name, scenario in SCENARIOS.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            try:
                with tempfile.TemporaryDirectory() as folder:
                    values = scenario(root, Path(folder), Path.cwd())
                found |= {f"{name}/{NOT_RUN}": ""} if values is None else digests(values, name)
            except Exception:
                found[f"{name}/{FAILED}"] = traceback.format_exc(limit=-4)
    return found


def digests(value: Any, name: str) -> dict[str, str]:
    """Digests of all that a value holds, by the path to it."""
    # here: the process that compares needs no torch
    from torch import Tensor, uint8

    if isinstance(value, Mapping):
        return {key: text for part, item in value.items() for key, text in digests(item, f"{name}/{part}").items()}
    if isinstance(value, list | tuple):
        return digests(dict(enumerate(value)), name)
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        head = f"{tensor.dtype} {tuple(tensor.shape)} "
        return {name: head + _hash(tensor.flatten().view(uint8).numpy().tobytes() if tensor.numel() else b"")}
    if isinstance(value, bytes):
        return {name: f"{len(value)} bytes {_hash(value)}"}
    text = repr(value)
    return {name: text if len(text) <= 40 else f"{len(text)} characters {_hash(text.encode())}"}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def report(before: Mapping[str, str], after: Mapping[str, str], revision: str) -> int:
    """Print what differs and a table; the exit status."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{revision} and the working tree")
    for heading in ("scenario", "equal", "different"):
        table.add_column(heading, justify="left" if heading == "scenario" else "right")
    differing = differences(before, after)
    names = before.keys() | after.keys()
    for scenario in dict.fromkeys(name.split("/")[0] for name in [*before, *after]):
        mine = {name for name in names if name.split("/")[0] == scenario}
        wrong = [name for name in differing if name in mine]
        for name in wrong[:SHOWN]:
            console.print(f"{name}\n    {revision}: {before.get(name, 'missing')}", markup=False, soft_wrap=True)
            console.print(f"    working tree: {after.get(name, 'missing')}", markup=False, soft_wrap=True)
        if len(wrong) > SHOWN:
            console.print(f"{scenario}: {len(wrong) - SHOWN} more")
        counts = (NOT_RUN, "") if f"{scenario}/{NOT_RUN}" in before else (str(len(mine) - len(wrong)), str(len(wrong)))
        table.add_row(scenario, *counts)
    console.print(table)
    return 1 if differing or not names else 0


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Names that differ, that one side lacks, or under which a scenario failed.

    Scenarios that were not run before have nothing to compare with: data are not there, or the revision is older than
    what they are about.
    """
    not_run = {name.split("/")[0] for name in before if name.endswith(f"/{NOT_RUN}")}
    names = sorted(name for name in before.keys() | after.keys() if name.split("/")[0] not in not_run)
    return [name for name in names if before.get(name) != after.get(name) or name.endswith(f"/{FAILED}")]


if __name__ == "__main__":
    sys.exit(main())
