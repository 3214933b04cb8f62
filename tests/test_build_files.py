"""What is not Python travels with the package: in the wheel, and in the sdist that it can be built from."""

import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import mfac_hf

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def package():
    """Each file of the package in this checkout, as git would see it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "mfac_hf"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a git checkout to know the package's files: {error}")
    names = {name for name in listed if (ROOT / name).exists()}
    assert {"mfac_hf/csrc/mfac_cpu.cpp", "mfac_hf/csrc/mfac_kernels.cu", "mfac_hf/py.typed"} <= names
    assert any(name.startswith("mfac_hf/hub/templates/") for name in names)
    return names


def test_the_wheel_has_every_file_of_the_package(package, tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
        (commands,) = [archive.read(name).decode() for name in names if name.endswith("/entry_points.txt")]
    assert {name for name in names if ".dist-info/" not in name} == package
    assert f"Version: {mfac_hf.__version__}\n" in metadata and "mfac = mfac_hf.cli:main" in commands


def test_the_sdist_has_what_the_wheel_is_built_from(package, tmp_path):
    (sdist,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package | {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "tests/conftest.py"} <= names
