"""The programs that build native kernels, and the processor that they build for."""

import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from mfac_hf.ops import bounded_wait

__all__ = ["compiler_command", "compiler_version", "find_compiler", "find_ninja", "processor_features"]


def find_ninja() -> str | None:
    """Find ninja on PATH, or beside this interpreter, whose environment need not be activated."""
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def find_compiler() -> str | None:
    """Find the C++ compiler that CXX names, or else the first of the usual ones."""
    candidates = _cxx()[:1] or ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def compiler_command() -> list[str]:
    """Return the C++ compiler's command, with the arguments that CXX gives it; empty where there is none."""
    path = find_compiler()
    return [path, *_cxx()[1:]] if path else []


def _cxx() -> list[str]:
    """Split CXX into words: it is the path of a program, or a program and its arguments, as in `ccache g++`."""
    value = os.environ.get("CXX", "")
    return [value] if shutil.which(value) else value.split()


def compiler_version(command: list[str]) -> str:
    """Ask a compiler for its version; empty where it does not run: the build fails then, and its log says why.

    Raises:
        HungError: it does not answer.
    """
    try:
        with tempfile.TemporaryFile() as answer:
            bounded_wait.run([*command, "--version"], messages=answer, errors=subprocess.DEVNULL)
            answer.seek(0)
            return answer.read().decode(errors="replace")
    except bounded_wait.HungError as error:
        raise bounded_wait.HungError(f"{command[0]} --version {error}") from error
    except OSError:
        return ""


def processor_features() -> str:
    """Return the processor's features, as far as the system tells: a library for one must not be loaded on another."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.split(":")[0].strip() in ("flags", "Features"):
                return line
    return platform.processor()
