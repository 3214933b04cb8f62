"""Builds the native kernels of `mfac_hf/csrc` just in time, for the device that is used.

Nothing is compiled at import or at installation. The first window on a kind of device asks for its kernels; until they
are built (once, some ten seconds), or where they cannot be, the PyTorch implementation in `mfac_hf.ops` answers, with
the same results up to rounding. The environment variable ``MFAC_NATIVE`` chooses:

- ``auto`` (default): build and use them; where that fails, warn once with the reason and go on without;
- ``force``: raise where that fails;
- ``off``: never.

A build lives in a directory of its own, named after a hash of everything that it depends on (sources, flags, torch,
compiler, processor), under ``MFAC_CACHE`` or ``~/.cache/mfac_hf``. Several processes build it once: a lock on an open
file orders them, and disappears with the process that holds it.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import warnings
from pathlib import Path

import torch

__all__ = [
    "NativeBuildError",
    "build_directory",
    "find_compiler",
    "find_ninja",
    "load_native",
    "missing_tools",
    "native_status",
]

SOURCES = {"cpu": "mfac_cpu.cpp"}
CSRC = Path(__file__).parent / "csrc"
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fPIC",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)

# The kernels use torch's stable ABI, of which they need a part that came with this version.
OLDEST_TORCH = (2, 10)

_outcome: dict[str, str | None] = {}  # kind of device -> None (loaded) or why not


class NativeBuildError(RuntimeError):
    """The native kernels could not be built or loaded; says why, and what to do."""


def load_native(device_type: str) -> bool:
    """Make sure that the kernels for a kind of device are registered, if there are any and ``MFAC_NATIVE`` allows
    them.

    Returns:
        Whether they are in use.

    Raises:
        NativeBuildError: under ``MFAC_NATIVE=force``, where they cannot be had.
        ValueError: for another value of ``MFAC_NATIVE``.
    """
    if device_type in _outcome:
        return _outcome[device_type] is None
    mode = os.environ.get("MFAC_NATIVE", "auto")
    if mode not in ("auto", "force", "off"):
        raise ValueError(f"MFAC_NATIVE is {mode!r}; expected auto, force or off")
    if mode == "off" or (mode == "auto" and device_type not in SOURCES):
        _outcome[device_type] = (
            "switched off by MFAC_NATIVE=off" if mode == "off" else "there are none for this device"
        )
        return False
    try:
        torch.ops.load_library(str(_library(device_type)))
    except (NativeBuildError, OSError) as error:
        if mode == "force":
            raise NativeBuildError(str(error)) from error
        _outcome[device_type] = str(error)
        warnings.warn(
            f"mfac_hf goes on without native {device_type} kernels (same results, slower): {error}. MFAC_NATIVE=off silences this",
            stacklevel=2,
        )
        return False
    _outcome[device_type] = None
    return True


def native_status(device_type: str) -> str:
    """Whether the kernels for a kind of device are in use or can be, in words."""
    if device_type in _outcome:
        return _outcome[device_type] or "in use"
    missing = missing_tools(device_type)
    if missing:
        return "; ".join(missing)
    directory = build_directory(device_type)
    built = (directory / f"mfac_{device_type}.so").exists()
    return f"built, in {directory}" if built else f"built at first use, in {directory}"


def missing_tools(device_type: str) -> list[str]:
    """What is missing to build the kernels for a kind of device, each with the way out."""
    missing = []
    if device_type not in SOURCES:
        return [f"there are no native kernels for {device_type}"]
    if _torch_version() < OLDEST_TORCH:
        missing.append(
            f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}: pip install -U torch"
        )
    if find_ninja() is None:
        missing.append("ninja was not found: pip install ninja")
    if find_compiler() is None:
        missing.append("no C++ compiler was found (c++, g++ or clang++): install one, or name it in CXX")
    return missing


def build_directory(device_type: str) -> Path:
    """Where the kernels for a kind of device are built: one directory for each combination of all that they depend
    on."""
    root = Path(os.environ.get("MFAC_CACHE") or Path.home() / ".cache" / "mfac_hf")
    compiler = find_compiler()
    parts = [
        (CSRC / SOURCES[device_type]).read_text(),
        " ".join(FLAGS),
        torch.__version__,
        f"{compiler} {_compiler_version(compiler)}" if compiler else "",
        platform.machine(),
        _processor(),
    ]
    return root / f"{device_type}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}"


def _library(device_type: str) -> Path:
    """The shared library, built where it is not there yet."""
    missing = missing_tools(device_type)
    if missing:
        raise NativeBuildError("; ".join(missing))
    directory = build_directory(device_type)
    library = directory / f"mfac_{device_type}.so"
    if library.exists():
        return library
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / "build.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise NativeBuildError(
            f"the build directory cannot be written ({error}); name another in the environment variable MFAC_CACHE"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():  # another process may have built it while this one waited
            _build(device_type, directory, library)
    return library


def _build(device_type: str, directory: Path, library: Path) -> None:
    from torch.utils.cpp_extension import (
        include_paths,
        library_paths,
    )  # here: a slow import that most processes never need

    includes = " ".join(f"-isystem {_escaped(path)}" for path in include_paths())
    libraries = " ".join(f"-L{_escaped(path)}" for path in library_paths())
    (directory / "build.ninja").write_text(
        f"rule library\n"
        f"  command = {_escaped(find_compiler() or '')} {' '.join(FLAGS)} {includes} -shared $in -o $out {libraries} -ltorch_cpu -lc10\n"
        f"build mfac.tmp.so: library {_escaped(str(CSRC / SOURCES[device_type]), path=True)}\n"
    )
    # Started in the directory, so that nothing depends on how its own path is spelled.
    result = subprocess.run([find_ninja() or "ninja"], cwd=directory, capture_output=True, text=True, check=False)
    log = directory / "build.log"
    log.write_text(result.stdout + result.stderr)
    if result.returncode != 0:
        raise NativeBuildError(f"the compiler failed; its messages are in {log}")
    (directory / "mfac.tmp.so").replace(library)


def _escaped(text: str, *, path: bool = False) -> str:
    """Text for a build file of ninja: dollars and, in a path, spaces and colons carry a dollar; in a command spaces a
    backslash."""
    text = text.replace("$", "$$")
    return text.replace(" ", "$ ").replace(":", "$:") if path else text.replace(" ", "\\ ")


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def find_ninja() -> str | None:
    """Path of ninja: the one on PATH, or beside this interpreter, whose environment need not be activated."""
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def find_compiler() -> str | None:
    """Path of the C++ compiler: the one that CXX names, or the first of the usual ones."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def _compiler_version(compiler: str) -> str:
    result = subprocess.run(
        [compiler, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip()


def _processor() -> str:
    """Features of the processor, as far as the system tells: a library built for one must not be loaded on another."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.split(":")[0].strip() in ("flags", "Features"):
                return line
    return platform.processor()
