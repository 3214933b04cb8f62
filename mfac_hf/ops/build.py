"""Build the native kernels of `mfac_hf/csrc` just in time, for the kind of device that is used.

Nothing is compiled at import or at installation. The first operation on a kind of device has its kernels built, once,
in some ten seconds on an idle machine, and a message says so. Where they cannot be built, the PyTorch implementations
in `mfac_hf.ops` answer, with the same results up to rounding. The environment variable ``MFAC_NATIVE`` chooses:

- ``auto`` (default): build and use them; where that fails, warn once with the reason and go on without them;
- ``force``: raise where that fails;
- ``off``: never.

Each build has a directory of its own under ``MFAC_CACHE`` or ``mfac_hf`` in ``XDG_CACHE_HOME`` (``~/.cache``), named
after a hash of everything that it depends on: sources, flags, torch, compilers, processor, kinds of CUDA devices.
Several processes build it once: a lock on an open file orders them, and disappears with the process that holds it. A
compiler, or a holder of the lock, that hangs is given up (`mfac_hf.ops.bounded_wait`).

Only a library that nobody else can have written is loaded: its directory and all above are looked at first
(`mfac_hf.ops.private_files`). And only a whole one, since loading half a library ends the interpreter: it is made
under a temporary name, its checksum is recorded, both are on the disk before it gets its own name, and the two are
compared before each use. One that does not fit is built anew.
"""

import hashlib
import logging
import os
import platform
import shlex
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mfac_hf.ops import bounded_wait, cuda_toolkit
from mfac_hf.ops.build_tools import compiler_command, compiler_version, find_compiler, find_ninja, processor_features
from mfac_hf.ops.private_files import UntrustedPathError, open_lock, private_directory, put_in_place, read_private

__all__ = [
    "NativeBuildError",
    "build_directory",
    "build_native",
    "load_native",
    "missing_tools",
    "native_status",
]

logger = logging.getLogger(__name__)

SOURCES = {
    "cpu": tuple(f"mfac_cpu{part}.cpp" for part in ("", "_metric", "_sparse", "_blocks", "_gram", "_trace")),
    "cuda": ("mfac_kernels.cu", "mfac_binding.cpp"),
}
CSRC = Path(__file__).parents[1] / "csrc"
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",  # or else a square root is a call
    "-fPIC",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # torch's stable ABI as of 2.10, the oldest of pyproject.toml
)

NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC")

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
        built = _find_built(directory, device_type)
    except NativeBuildError as error:
        return str(error)
    return f"built at first use, in {directory}" if built is None else f"built, in {directory}"


def missing_tools(device_type: str) -> list[str]:
    """List what is missing to build the kernels for a kind of device, each with the way out."""
    if device_type not in SOURCES:
        return [f"there are no native kernels for {device_type}"]
    missing = []
    if os.name != "posix":
        missing.append(f"native kernels are built on Linux and macOS, not on {platform.system()}")
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
        root = Path(os.environ.get("MFAC_CACHE") or _default_cache()).expanduser()
    except RuntimeError as error:
        raise NativeBuildError(
            f"no directory to build in ({error}); name one in the environment variable MFAC_CACHE"
        ) from error
    compiler = compiler_command()
    try:
        version = compiler_version(compiler)
    except bounded_wait.HungError as error:
        raise NativeBuildError(f"{error}; name another compiler in CXX") from error
    parts = [
        *(path.read_text(encoding="utf-8") for path in sorted(CSRC.iterdir())),
        " ".join(FLAGS),
        torch.__version__,
        " ".join(compiler),
        version,
        platform.machine(),
        processor_features(),
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
    directory = build_directory(device_type)
    library = _find_built(directory, device_type)
    if library is not None:
        return library
    with _errors_named(directory):
        library = _library(private_directory(directory, create=True), device_type)
        lock = open_lock(library.with_name("build.lock"))
        try:
            bounded_wait.lock(lock)
            if not _is_whole(library):  # another process may have built it while this one waited
                # A warning, since the step that waits here would look stuck.
                logger.warning("building native %s kernels, once, in %s: the first step waits", device_type, directory)
                _build(device_type, library, lambda: os.utime(lock))
        finally:
            os.close(lock)
    return library


def _find_built(directory: Path, device_type: str) -> Path | None:
    """Return the path of a library that was built before and may be loaded; None if there is none.

    Raises:
        NativeBuildError: others can write the directory, or it cannot be looked at.
    """
    with _errors_named(directory):
        try:
            library = _library(private_directory(directory), device_type)
        except FileNotFoundError:
            return None
        return library if _is_whole(library) else None


@contextmanager
def _errors_named(directory: Path) -> Iterator[None]:
    """Make what can go wrong with a build directory a NativeBuildError."""
    try:
        yield
    except UntrustedPathError as error:
        raise NativeBuildError(f"the build directory {directory} is refused: {error}") from error
    except bounded_wait.HungError as error:
        raise NativeBuildError(
            f"another process holds {directory / 'build.lock'} and {error}: end it, or name another directory in the "
            "environment variable MFAC_CACHE"
        ) from error
    except OSError as error:
        raise NativeBuildError(
            f"the build directory {directory} cannot be written ({error}); name another in the environment variable "
            "MFAC_CACHE"
        ) from error


def _is_whole(library: Path) -> bool:
    """Whether this is the library that was built: nobody else can have written it, and its checksum fits."""
    content, recorded = read_private(library), read_private(_checksum_file(library))
    return content is not None and recorded == hashlib.sha256(content).hexdigest().encode()


def _build(device_type: str, library: Path, working: Callable[[], None] = lambda: None) -> None:
    """Compile and link a library, and put it, its checksum and the compiler's messages in place."""
    from torch.utils.cpp_extension import include_paths, library_paths  # here: slow, and most processes never need it

    log = library.with_name("build.log")
    compiler, nvcc = compiler_command(), cuda_toolkit.find_nvcc() or "nvcc"
    # A directory of its own: the compiler of a build that was killed may go on writing for a while.
    with tempfile.TemporaryDirectory(
        dir=library.parent, prefix="unfinished-", ignore_cleanup_errors=True
    ) as temporary:
        objects = [Path(source).with_suffix(".o").name for source in SOURCES[device_type]]
        rules = ""
        for source, name in zip(SOURCES[device_type], objects, strict=True):
            if source.endswith(".cu"):
                command = [nvcc, *NVCC_FLAGS]
                for arch in cuda_toolkit.architectures():
                    command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
            else:
                command = [*compiler, *FLAGS, *(["-DUSE_CUDA"] if device_type == "cuda" else [])]
                for path in include_paths():
                    command += ["-isystem", path]
            rules += _rule(name, [], [*command, "-c", str(CSRC / source), "-o", name])
        # The CUDA runtime goes into the library: torch's own is of the same major version at best.
        link = [nvcc, "-shared", "-cudart", "static"] if device_type == "cuda" else [*compiler, "-shared"]
        libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
        if device_type == "cuda":
            libraries.append("-ltorch_cuda")
        rules += _rule(library.name, objects, [*link, *objects, "-o", library.name, *libraries])
        (Path(temporary) / "build.ninja").write_text(rules, encoding="utf-8")
        messages = Path(temporary) / log.name
        with open(messages, "wb") as output:
            try:
                ninja = [find_ninja() or "ninja"]
                status = bounded_wait.run(ninja, folder=Path(temporary), messages=output, working=working)
            except bounded_wait.HungError as error:
                raise NativeBuildError(f"the compiler {error} and was ended; its messages are in {log}") from error
            except OSError as error:
                raise NativeBuildError(f"ninja does not run ({error}): pip install --force-reinstall ninja") from error
            finally:
                put_in_place(messages, log)
        made = Path(temporary) / library.name
        if status != 0 or not made.exists():
            raise NativeBuildError(f"the compiler failed; its messages are in {log}")
        checksum = _checksum_file(made)
        checksum.write_text(hashlib.sha256(made.read_bytes()).hexdigest(), encoding="ascii")
        put_in_place(checksum, _checksum_file(library))
        put_in_place(made, library)


def _rule(made: str, needed: list[str], command: list[str]) -> str:
    escaped = shlex.join(command).replace("$", "$$")  # for the shell, then for ninja
    return f"rule make_{made}\n  command = {escaped}\nbuild {made}: make_{made} {' '.join(needed)}\n"


def _library(directory: Path, device_type: str) -> Path:
    return directory / f"mfac_{device_type}.so"


def _checksum_file(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _default_cache() -> str:
    """Return the place that the XDG base directory specification names; it ignores relative paths."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return os.path.join(named, "mfac_hf") if os.path.isabs(named) else "~/.cache/mfac_hf"


def _mode() -> str:
    mode = os.environ.get("MFAC_NATIVE") or "auto"
    if mode not in ("auto", "force", "off"):
        raise ValueError(f"MFAC_NATIVE is {mode!r}; expected auto, force or off")
    return mode
