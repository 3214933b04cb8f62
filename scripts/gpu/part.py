"""What a part of `scripts/gpu_check.py` is, and what it is told."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]


class NotCheckedError(Exception):
    """The part cannot be run here; says why."""


@dataclass(frozen=True)
class Context:
    """What a part is told.

    Attributes:
        kind: of the device where it computes, ``"cuda"`` or ``"cpu"``.
        scratch: an empty folder of its own.
        sst2: a folder in the layout of GLUE, a BERT and its vocabulary for the epoch; None where it generates its own.
    """

    kind: str
    scratch: Path
    sst2: tuple[str, str] | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        import torch  # here: the process that starts the parts begins without it

        return torch.device(self.kind)

    @property
    def rehearsal(self) -> bool:
        """Whether this is no GPU: the same code on smaller sizes."""
        return self.kind != "cuda"


@dataclass(frozen=True)
class Part:
    """A part, which runs in a process of its own.

    Attributes:
        name: its name.
        says: what it shows, in a sentence.
        run: module and name of ``function(context)``, which does it, prints tables in Markdown, and returns figures.
            What is wrong raises.
        limit: seconds that it may take.
        measures: whether it only measures, so that its failure is recorded without deciding the outcome.
    """

    name: str
    says: str
    run: str
    limit: float
    measures: bool = False


def require(good: bool, message: str) -> None:
    """Raise AssertionError with the message unless this is so."""
    if not good:
        raise AssertionError(message)


def run_tests(kind: str, files: Sequence[str]) -> dict[str, Any]:
    """Run test files of this repository, the slow tests excepted, on a kind of device (`tests/helpers/device.py`).

    Raises:
        AssertionError: a test failed, or none ran.
        NotCheckedError: there is no pytest.
    """
    if missing := [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]:
        raise NotCheckedError(f"not installed: pip install {' '.join(missing)}")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--tb=short", "-p", "no:cacheprovider", *files]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "MFAC_TEST_DEVICE": kind, "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(result.stdout, file=sys.stderr)
    summary = (result.stdout.strip().splitlines() or ["pytest said nothing"])[-1].strip("= ")
    require(result.returncode == 0, f"tests on {kind}: {summary}")
    print(f"tests on {kind}: {summary}")
    return {"tests": list(files), "summary": summary}
