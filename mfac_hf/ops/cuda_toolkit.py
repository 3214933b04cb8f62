"""The CUDA toolkit that compiles the native kernels: where it is, and whether it fits torch and the devices.

torch's own look-up is not used: a build of torch without CUDA knows no toolkit even where the environment names one, a
wrapper script around nvcc makes it guess the wrong folder, and it does not compare nvcc's version with torch's.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

__all__ = ["architectures", "find_nvcc", "missing_cuda", "toolkit_home", "toolkit_version"]


def find_nvcc() -> str | None:
    """Find nvcc in the CUDA folder that the environment names, on PATH, or in the customary place."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:
            return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def toolkit_home(nvcc: str) -> Path | None:
    """Return the folder of the toolkit that nvcc (or what it wraps) says it belongs to; None if it does not say."""
    said = re.search(r"^#\$ _HERE_=(.+)$", _run([nvcc, "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE)
    return Path(said.group(1).strip()).parent if said else None


def toolkit_version(nvcc: str) -> str | None:
    """Return the version of nvcc, such as "13.0"; None if it does not run."""
    said = re.search(r"release (\d+\.\d+)", _run([nvcc, "--version"]))
    return said.group(1) if said else None


def architectures() -> list[str]:
    """List the compute capabilities of all CUDA devices that torch sees, such as "90"."""
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}{minor}" for major, minor in sorted(capabilities)]


def missing_cuda() -> list[str]:
    """List what is missing to compile CUDA kernels for this torch and its devices, each with the way out."""
    wanted = torch.version.cuda
    if wanted is None:
        return ["this torch is built without CUDA: install a build with it"]
    major = wanted.split(".")[0]
    ways_out = f"install the CUDA toolkit {major}, or name its folder in CUDA_HOME"
    missing = (
        [] if torch.cuda.is_available() else ["torch sees no CUDA device: check the driver and CUDA_VISIBLE_DEVICES"]
    )
    nvcc = find_nvcc()
    if nvcc is None:
        return [*missing, f"nvcc was not found: {ways_out}"]
    version = toolkit_version(nvcc)
    if version is None:
        return [*missing, f"{nvcc} does not run, or does not tell its version: {ways_out}"]
    if version.split(".")[0] != major:
        missing.append(f"{nvcc} is of CUDA {version}, torch of CUDA {wanted}: {ways_out}")
    home = toolkit_home(nvcc)
    for name, files in (
        ("headers", ["include/cuda_runtime.h"]),
        ("libraries", ["lib64/libcudart_static.a", "lib/libcudart_static.a"]),
    ):
        if home is None or not any((home / file).exists() for file in files):
            missing.append(f"{nvcc} has no {name} in {home} (sought {' or '.join(files)}): {ways_out}")
    return missing


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout + result.stderr
