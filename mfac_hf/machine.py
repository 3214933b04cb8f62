"""The machine that a run is on: its processor, its memory, and what it takes to repeat the run.

`mfac --help` imports this, so functions import torch and other slow modules themselves.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "GIB",
    "available_bytes",
    "cpu_name",
    "describe_run",
    "package_version",
    "peak_memory",
    "prefer_huge_pages",
    "relative_paths",
]

GIB = 1 << 30

# Where the system shows control groups, which limit the memory of containers, services and batch jobs; and which of
# them this process is in.
CONTROL_GROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")

# The files with a group's limit and use, and the counter in memory.stat of files that were read: they count as used,
# although the system drops them from memory when it needs the room.
GROUP_FILES_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
GROUP_FILES_V2 = ("memory.max", "memory.current", "inactive_file")

# Smaller buffers have few pages, or share the first and the last with others.
HUGE_PAGES_MIN_BYTES = 16 << 20

# A result file records their versions.
RECORDED_PACKAGES = "mfac_hf torch transformers datasets accelerate evaluate numpy scipy scikit-learn".split()


def cpu_name() -> str:
    """Name the processor's model."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux, where platform.processor() is empty or just the architecture
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def available_bytes(device: torch.device) -> int:
    """Return the bytes of memory that a process can still take on a device.

    On a CPU that is the least that these leave: the system; every control group around this process, of version 1 or
    2, its own and those that hold it; the limits of the process itself (``ulimit -v`` and ``-d``).
    """
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil  # here: importing the package has to stay light

    return max(0, min([int(psutil.virtual_memory().available), *_left_in_groups(), *_left_to_process()]))


def _left_in_groups() -> Iterator[int]:
    """Bytes that each control group around this process leaves, where it has a limit."""
    for folder, (limit, usage, reclaimable) in _group_folders():
        try:
            left = int((folder / limit).read_text()) - int((folder / usage).read_text())
            details = folder / "memory.stat"
            counters = dict(line.split() for line in details.read_text().splitlines()) if details.exists() else {}
            left += int(counters.get(reclaimable, 0))
        except (OSError, ValueError):
            continue  # the system shows no such group here, or its limit is "max", which is none
        yield left


def _group_folders() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders that a control group around this process may have, with the names of the files in it."""
    try:
        entries = [line.split(":", 2) for line in OWN_GROUPS.read_text().splitlines()]
    except OSError:
        entries = []  # no Linux
    # A line of version 1 lists its controllers, that of version 2 none.
    own = {"memory" if "memory" in names.split(",") else names: path for _, names, path in entries}
    for mount, version, files in (
        (CONTROL_GROUP, "", GROUP_FILES_V2),
        (CONTROL_GROUP / "unified", "", GROUP_FILES_V2),  # beside those of version 1
        (CONTROL_GROUP / "memory", "memory", GROUP_FILES_V1),
    ):
        parts = [part for part in own.get(version, "").split("/") if part]
        if ".." in parts:
            parts = []  # outside of what a container sees, which then shows its own group as the outermost
        for depth in range(len(parts) + 1):
            yield mount.joinpath(*parts[:depth]), files


def _left_to_process() -> Iterator[int]:
    """Bytes that the limits of address space and of private memory leave to this process."""
    sizes = _own_sizes()
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        allowed, _ = resource.getrlimit(limit)
        if allowed != resource.RLIM_INFINITY and name in sizes:
            yield allowed - sizes[name]


def _own_sizes() -> dict[str, int]:
    """Sizes of this process in bytes, by their names in Linux; empty elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines if line.startswith("Vm")]
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, *_ in words}


def prefer_huge_pages(buffer: Tensor) -> None:
    """Advise Linux to back a large buffer in host memory with huge pages; elsewhere, and for a small one, nothing.

    A pass over the window jumps from row to row, onto another page each time. Its pages of 4 KiB do not fit the
    processor's address cache; those of 2 MiB do (5 to 15 % faster passes on Zen 3). Advice only: the system may ignore
    it, and nothing but speed depends on it.
    """
    if sys.platform != "linux" or buffer.device.type != "cpu" or buffer.nbytes < HUGE_PAGES_MIN_BYTES:
        return
    start = -(-buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (buffer.data_ptr() + buffer.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_HUGEPAGE))


def describe_run(argv: Sequence[str] | None, device: torch.device) -> dict[str, Any]:
    """Record what it takes to repeat a run, and the memory that it took so far.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.
        device: the device that the run computes on.

    Returns:
        Command line, package versions, device, threads and peak memory, as plain JSON types; of a run of several
        processes also their number (``ranks``) and what started them (``launcher``).
    """
    import torch

    record = {
        "command": relative_paths(_without_tokens([sys.argv[0], *(sys.argv[1:] if argv is None else argv)])),
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in RECORDED_PACKAGES},
        },
        "device": _device(device),
        "threads": torch.get_num_threads(),
        "peak_memory_gib": round(peak_memory() / GIB, 3),
    }
    if device.type == "cuda":
        record["peak_device_memory_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    if (ranks := _ranks()) > 1:
        record["ranks"] = ranks
        if (launcher := _launcher()) is not None:
            record["launcher"] = launcher
    return record


def _ranks() -> int:
    """Count the processes of the run, whichever way they were started."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    world_size = os.environ.get("WORLD_SIZE", "1")
    return int(world_size) if world_size.isdecimal() else 1


def _launcher() -> str | None:
    """Find the words that stand before the program in the command that started all ranks; None if it was no launcher.

    ``torchrun`` and ``accelerate launch`` are the parents of the ranks. Where the parent's command does not name the
    program, this is a command of ``torchrun`` with the same numbers of ranks.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    import shlex

    import psutil

    try:
        command = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        command = []
    program = os.path.basename(sys.argv[0])
    for end, word in enumerate(command):
        if end > 1 and os.path.basename(word) == program:
            words = command[:end]
            if words[1] != "-m":
                words = words[1:]  # the interpreter that runs the launcher
            return shlex.join(relative_paths(_without_tokens([os.path.basename(words[0]), *words[1:]])))
    local, ranks = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    nodes = f" --nnodes {ranks // local}" if ranks > local else ""
    return f"torchrun{nodes} --nproc_per_node {local}"


def relative_paths(value: Any) -> Any:
    """Rewrite absolute paths inside a JSON-like value relative to the working directory."""
    if isinstance(value, dict):
        return {key: relative_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [relative_paths(item) for item in value]
    if isinstance(value, str) and value.startswith("--") and "=" in value:
        flag, path = value.split("=", 1)
        return f"{flag}={relative_paths(path)}"
    return os.path.relpath(value) if isinstance(value, str) and os.path.isabs(value) else value


def _without_tokens(command: Sequence[str]) -> list[str]:
    """Blank the value of every ``--…token`` flag: a result file is made to be shared."""
    blanked, secret = [], False
    for word in command:
        name, equals, _ = word.partition("=")
        blanked.append("..." if secret else name + "=..." if equals and name.endswith("token") else word)
        secret = not equals and name.startswith("--") and name.endswith("token")
    return blanked


def package_version(package: str) -> str | None:
    """Look up the version of a distribution without importing it; None where it is not installed."""
    import importlib.metadata  # here: it takes a third of the time of `mfac --help`

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})"


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held at once."""
    # Not getrusage where it can be avoided: there a process begins with the peak of the one that started it.
    if (peak := _own_sizes().get("VmHWM")) is not None:
        return peak
    # macOS counts bytes, others kilobytes
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
