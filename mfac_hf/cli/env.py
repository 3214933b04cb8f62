"""`mfac env` prints versions, devices and build tools, and what follows from each thing that is missing.

`mfac env --json` prints the same facts for programs and bug reports. `mfac env --build` first builds the native
kernels, which otherwise happens at the first training step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from typing import Any

from mfac_hf.cli.errors import CommandError
from mfac_hf.machine import GIB, available_bytes, cpu_name, package_version

PACKAGES = ("mfac_hf", "torch", "transformers", "datasets", "accelerate", "evaluate")


def add_parser(commands: Any) -> None:
    """Add `mfac env` to the sub-commands."""
    env = commands.add_parser(
        "env",
        help="print versions, devices, and what is missing",
        description="Print versions, devices, build tools, and what follows from each thing that is missing.",
    )
    env.add_argument("--json", action="store_true", help="print JSON in place of tables")
    env.add_argument(
        "--build", action="store_true", help="first build the native kernels for the device that accelerate chooses"
    )
    env.set_defaults(run=_run_env)


def _run_env(arguments: argparse.Namespace) -> None:
    """Print the report of `environment`, as tables or as JSON, after building what `--build` asks for."""
    try:
        if arguments.build:
            _build_native()
        report = environment()
    except ImportError as error:
        raise CommandError(f"{error}. Install mfac_hf again, with what it needs: pip install mfac_hf") from error
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print_tables(report)


def _build_native() -> None:
    """Build the native kernels for the device that accelerate chooses, whatever `MFAC_NATIVE` says."""
    from mfac_hf.ops import build

    try:
        build.build_native(_accelerate_device().split(":")[0])
    except build.NativeBuildError as error:
        raise CommandError(str(error)) from error


def environment() -> dict[str, Any]:
    """Collect versions, devices and build tools of this process's environment.

    Returns:
        A dictionary of plain JSON types: `versions` (None: not installed, or for `torch_cuda` a build without CUDA),
        `cpu` and `cuda` (memory in GiB), `accelerate_device` (the device that a `Trainer` would use), `native_kernels`
        (whether they are in use or can be, for each kind of device), `tools` (path and version, None: not found) and
        `missing`, a list of `{"what": ..., "so": ...}`.

    Raises:
        ImportError: a library that the report needs is not installed or does not load.
        CommandError: an environment variable gives accelerate or `MFAC_NATIVE` a value that it does not know.
    """
    import torch

    from mfac_hf.ops import build, build_tools, cuda_toolkit

    device = _accelerate_device()
    try:
        kernels = {kind: build.native_status(kind) for kind in dict.fromkeys(["cpu", device.split(":")[0]])}
    except ValueError as error:
        raise CommandError(str(error)) from error
    report: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in PACKAGES},
            "torch_cuda": torch.version.cuda,
        },
        "cpu": _cpu(),
        "cuda": _cuda_devices(),
        "accelerate_device": device,
        "native_kernels": kernels,
        "tools": {
            "ninja": _tool(build_tools.find_ninja()),
            "cxx": _tool(build_tools.find_compiler()),
            "nvcc": _tool(cuda_toolkit.find_nvcc()),
        },
    }
    report["missing"] = _missing(report)
    return report


def _cpu() -> dict[str, Any]:
    """Describe the processor, the threads that torch would use on it, and the machine's memory."""
    import psutil
    import torch

    return {
        "name": cpu_name(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "available_gib": round(available_bytes(torch.device("cpu")) / GIB, 1),
    }


def _cuda_devices() -> list[dict[str, Any]]:
    """List the CUDA devices that torch sees."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / GIB, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    return devices


def _accelerate_device() -> str:
    """Ask accelerate for the device that it, and so a `Trainer`, would choose."""
    from accelerate import Accelerator

    try:
        return str(Accelerator().device)
    except (RuntimeError, ValueError) as error:
        settings = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
        raise CommandError(
            f"accelerate cannot choose a device: {error}. Check or unset the environment variables that it reads; "
            f"set now: {settings or 'none of ACCELERATE_*'}"
        ) from error


def _tool(path: str | None) -> dict[str, str] | None:
    """Ask a program for its version, the line of its `--version` output that says it."""
    if path is None:
        return None
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"path": path, "version": f"does not run: {error}"}
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # nvcc prints its name and a copyright notice first; the others print the version first.
    release = [line for line in lines if "release" in line]
    return {"path": path, "version": (release or lines or ["unknown"])[0]}


def _missing(report: dict[str, Any]) -> list[dict[str, str]]:
    """List what the report lacks, each with what follows from it."""
    missing = []

    def add(what: str, so: str) -> None:
        missing.append({"what": what, "so": so})

    versions, tools = report["versions"], report["tools"]
    if versions["mfac_hf"] is None:
        add("mfac_hf", "it runs from a folder and is not installed: pip install -e . in that folder")
    for name in PACKAGES:
        if versions[name] is None and name != "mfac_hf":
            add(name, f"parts of mfac_hf fail without it: pip install {name}")
    if not report["cuda"]:
        so = f"training runs on {report['accelerate_device']}"
        if versions["torch_cuda"] is None and shutil.which("nvidia-smi"):
            so += "; nvidia-smi is here, but this torch is built without CUDA: install a build with it to use the GPU"
        add("CUDA device", so)
    fallback = "kernels cannot be built here; PyTorch's own operations do the work. To change it:"
    if tools["ninja"] is None:
        add("ninja", f"native {fallback} pip install ninja")
    if tools["cxx"] is None:
        add("C++ compiler", f"native {fallback} install one, such as g++ or clang++, or name it in CXX")
    if tools["nvcc"] is None and report["cuda"]:  # without a CUDA device it is not missed
        add("nvcc", f"CUDA {fallback} install the CUDA toolkit, or name its folder in CUDA_HOME")
    if importlib.util.find_spec("matplotlib") is None:
        add("matplotlib", "no loss-curve pictures: pip install 'mfac_hf[plots]'")
    if importlib.util.find_spec("peft") is None:
        add("peft", "no LoRA in the training scripts: pip install 'mfac_hf[lora]'")
    return missing


def _print_tables(report: dict[str, Any]) -> None:
    """Print the report for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def show(title: str, rows: list[tuple[str, str]]) -> None:
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in rows:
            table.add_row(key, Text(value))  # Text: a path with [brackets] is no markup
        console.print(table)

    versions = dict(report["versions"])
    versions["CUDA of torch"] = versions.pop("torch_cuda") or "none: a build without CUDA"
    show("Versions", [(name, version or "not installed") for name, version in versions.items()])

    cpu = report["cpu"]
    devices = [
        (
            "CPU",
            f"{cpu['name']}, cores: {cpu['physical_cores'] or 'unknown'} ({cpu['logical_cores']} logical), "
            f"torch threads: {cpu['torch_threads']}, memory: {cpu['memory_gib']} GiB "
            f"({cpu['available_gib']} available)",
        )
    ]
    for index, device in enumerate(report["cuda"]):
        capability = f"compute capability {device['compute_capability']}"
        devices.append((f"cuda:{index}", f"{device['name']}, memory: {device['memory_gib']} GiB, {capability}"))
    devices.append(("accelerate uses", report["accelerate_device"]))
    devices += [(f"{kind} kernels", status) for kind, status in report["native_kernels"].items()]
    show("Devices", devices)

    titles = {"cxx": "C++ compiler"}
    tools = [
        (titles.get(name, name), f"{tool['version']} ({tool['path']})" if tool else "not found")
        for name, tool in report["tools"].items()
    ]
    show("Build tools", tools)

    if report["missing"]:
        show("Missing", [(entry["what"], entry["so"]) for entry in report["missing"]])
    else:
        console.print("Nothing is missing.")
