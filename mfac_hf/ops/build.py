"""Build the native kernels of `mfac_hf/csrc` just in time, for the kind of device that is used.

Nothing is compiled at import or at installation. The first operation on a kind of device has its kernels built, once,
in some ten seconds. Where they cannot be built, the PyTorch implementations in `mfac_hf.ops` answer, with the same
results up to rounding. The environment variable ``MFAC_NATIVE`` chooses:

- ``auto`` (default): build and use them; where that fails, warn once with the reason and go on without them;
- ``force``: raise where that fails;
- ``off``: never.

Each build has a directory of its own under ``MFAC_CACHE`` or ``~/.cache/mfac_hf``, named after a hash of everything
that it depends on: sources, flags, torch, compilers, processor, kinds of CUDA devices. Several processes build it
once: a lock on an open file orders them, and disappears with the process that holds it. The library is made under a
temporary name and gets its own when it is whole.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from pathlib import Path

import torch

from mfac_hf.ops import cuda_toolkit

__all__ = [
    "NativeBuildError",
    "build_directory",
    "build_native",
    "find_compiler",
    "find_ninja",
    "load_native",
    "missing_tools",
    "native_status",
]

SOURCES = {
    "cpu": ("mfac_cpu.cpp", "mfac_cpu_sparse.cpp", "mfac_cpu_blocks.cpp", "mfac_cpu_gram.cpp", "mfac_cpu_trace.cpp"),
    "cuda": ("mfac_kernels.cu", "mfac_binding.cpp"),
}
CSRC = Path(__file__).parents[1] / "csrc"
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fPIC",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)

NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC")

# The kernels use torch's stable ABI, of which they need a part that came with this version.
OLDEST_TORCH = (2, 10)

_outcome: dict[str, str | None] = {}  # by kind of device: None where its kernels are loaded, else why not


class NativeBuildError(RuntimeError):
    """The native kernels could not be built or loaded; says why, and what to do."""


def load_native(device_type: str) -> bool:
    """Load the kernels for a kind of device, if there are any and ``MFAC_NATIVE`` allows them.

    Returns:
        Whether they are in use.

    Raises:
        NativeBuildError: they cannot be built or loaded, under ``MFAC_NATIVE=force``.
        ValueError: ``MFAC_NATIVE`` has an unknown value.
    """
    if device_type in _outcome:
        return _outcome[device_type] is None
    mode = _mode()
    if mode == "off" or (mode == "auto" and device_type not in SOURCES):
        _outcome[device_type] = native_status(device_type)
        return False
    try:
        library = build_native(device_type)
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            raise NativeBuildError(
                f"{library} does not load ({error.__cause__ or error}); delete {library.parent} to have it built anew"
            ) from error
    except NativeBuildError as error:
        if mode == "force":
            raise
        _outcome[device_type] = str(error)
        warnings.warn(
            f"mfac_hf goes on without native {device_type} kernels (same results, slower): {error}. "
            "MFAC_NATIVE=off silences this",
            stacklevel=2,
        )
        return False
    _outcome[device_type] = None
    return True


def native_status(device_type: str) -> str:
    """Say in words whether the kernels for a kind of device are in use, or can be.

    Raises:
        ValueError: ``MFAC_NATIVE`` has an unknown value.
    """
    if device_type in _outcome:
        return _outcome[device_type] or "in use"
    if _mode() == "off":
        return "switched off by MFAC_NATIVE=off"
    missing = missing_tools(device_type)
    if missing:
        return "; ".join(missing)
    try:
        directory = build_directory(device_type)
    except NativeBuildError as error:
        return str(error)
    built = os.path.exists(_library(directory, device_type))  # False also where looking is not allowed
    return f"built, in {directory}" if built else f"built at first use, in {directory}"


def missing_tools(device_type: str) -> list[str]:
    """List what is missing to build the kernels for a kind of device, each with the way out."""
    if device_type not in SOURCES:
        return [f"there are no native kernels for {device_type}"]
    missing = []
    if os.name != "posix":
        missing.append(f"native kernels are built on Linux and macOS, not on {platform.system()}")
    if _torch_version() < OLDEST_TORCH:
        missing.append(
            f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}: pip install -U torch"
        )
    if find_ninja() is None:
        missing.append("ninja was not found: pip install ninja")
    if find_compiler() is None:
        sought = f"CXX is {os.environ['CXX']!r}" if os.environ.get("CXX") else "c++, g++ or clang++"
        missing.append(f"no C++ compiler was found ({sought}): install one, or name it in CXX")
    if device_type == "cuda":
        missing += cuda_toolkit.missing_cuda()
    return missing


def build_directory(device_type: str) -> Path:
    """Return the directory of the kernels for a kind of device; there is one for all that they depend on together.

    Raises:
        NativeBuildError: there are no such kernels; or ``MFAC_CACHE`` names no directory and there is no home.
    """
    if device_type not in SOURCES:
        raise NativeBuildError("; ".join(missing_tools(device_type)))
    try:
        root = Path(os.environ.get("MFAC_CACHE") or "~/.cache/mfac_hf").expanduser()
    except RuntimeError as error:
        raise NativeBuildError(
            f"no directory to build in ({error}); name one in the environment variable MFAC_CACHE"
        ) from error
    compiler = _compiler()
    parts = [
        *(path.read_text(encoding="utf-8") for path in sorted(CSRC.iterdir())),
        " ".join(FLAGS),
        torch.__version__,
        " ".join(compiler),
        _compiler_version(compiler),
        platform.machine(),
        _processor(),
    ]
    if device_type == "cuda":
        nvcc = cuda_toolkit.find_nvcc() or ""
        parts += [*NVCC_FLAGS, nvcc, cuda_toolkit.toolkit_version(nvcc) or "", *cuda_toolkit.architectures()]
    return root / f"{device_type}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}"


def build_native(device_type: str) -> Path:
    """Build the kernels for a kind of device unless that was done before, and return the path of the library.

    Raises:
        NativeBuildError: something is missing, the directory cannot be written, or the compiler fails.
    """
    missing = missing_tools(device_type)
    if missing:
        raise NativeBuildError("; ".join(missing))
    import fcntl  # here: Windows has none

    directory = build_directory(device_type)
    library = _library(directory, device_type)
    if os.path.exists(library):
        return library
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "build.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():  # another process may have built it while this one waited
                _build(device_type, library)
    except OSError as error:
        raise NativeBuildError(
            f"the build directory {directory} cannot be written ({error}); name another in the environment variable "
            "MFAC_CACHE"
        ) from error
    return library


def _build(device_type: str, library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths  # here: slow, and most processes never need it

    log = library.with_name("build.log")
    # A directory of its own: the compiler of a build that was killed may go on writing for a while.
    with tempfile.TemporaryDirectory(
        dir=library.parent, prefix="unfinished-", ignore_cleanup_errors=True
    ) as temporary:
        objects = [Path(source).with_suffix(".o").name for source in SOURCES[device_type]]
        rules = ""
        for source, name in zip(SOURCES[device_type], objects, strict=True):
            if source.endswith(".cu"):
                command = [*_nvcc(), *NVCC_FLAGS]
                for arch in cuda_toolkit.architectures():
                    command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
            else:
                command = [*_compiler(), *FLAGS, *(["-DUSE_CUDA"] if device_type == "cuda" else [])]
                for path in include_paths():
                    command += ["-isystem", path]
            rules += _rule(name, [], [*command, "-c", str(CSRC / source), "-o", name])
        # The CUDA runtime goes into the library: torch's own is of the same major version at best.
        link = [*_nvcc(), "-shared", "-cudart", "static"] if device_type == "cuda" else [*_compiler(), "-shared"]
        libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
        if device_type == "cuda":
            libraries.append("-ltorch_cuda")
        rules += _rule(library.name, objects, [*link, *objects, "-o", library.name, *libraries])
        (Path(temporary) / "build.ninja").write_text(rules, encoding="utf-8")
        with open(log, "wb") as messages:
            try:
                result = subprocess.run(
                    [find_ninja() or "ninja"], cwd=temporary, stdout=messages, stderr=messages, check=False
                )
            except OSError as error:
                raise NativeBuildError(f"ninja does not run ({error}): pip install --force-reinstall ninja") from error
        made = Path(temporary) / library.name
        if result.returncode != 0 or not made.exists():
            raise NativeBuildError(f"the compiler failed; its messages are in {log}")
        made.replace(library)


def _rule(made: str, needed: list[str], command: list[str]) -> str:
    escaped = shlex.join(command).replace("$", "$$")  # for the shell, then for ninja
    return f"rule make_{made}\n  command = {escaped}\nbuild {made}: make_{made} {' '.join(needed)}\n"


def _library(directory: Path, device_type: str) -> Path:
    return directory / f"mfac_{device_type}.so"


def _mode() -> str:
    mode = os.environ.get("MFAC_NATIVE") or "auto"
    if mode not in ("auto", "force", "off"):
        raise ValueError(f"MFAC_NATIVE is {mode!r}; expected auto, force or off")
    return mode


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def find_ninja() -> str | None:
    """Find ninja on PATH, or beside this interpreter, whose environment need not be activated."""
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def find_compiler() -> str | None:
    """Find the C++ compiler that CXX names, or else the first of the usual ones."""
    candidates = _cxx()[:1] or ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def _compiler() -> list[str]:
    """Return the C++ compiler's command, with the arguments that CXX gives it; empty where there is none."""
    path = find_compiler()
    return [path, *_cxx()[1:]] if path else []


def _nvcc() -> list[str]:
    return [cuda_toolkit.find_nvcc() or "nvcc"]


def _cxx() -> list[str]:
    """Split CXX into words: it is the path of a program, or a program and its arguments, as in `ccache g++`."""
    value = os.environ.get("CXX", "")
    return [value] if shutil.which(value) else value.split()


def _compiler_version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace").stdout
    except OSError:
        return ""  # it does not run: the build fails, and its log says why


def _processor() -> str:
    """Return the processor's features, as far as the system tells: a library for one must not be loaded on another."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.split(":")[0].strip() in ("flags", "Features"):
                return line
    return platform.processor()
