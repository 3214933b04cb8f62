"""What the machine is, and what a result file says of it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mfac_hf import machine
from mfac_hf.machine import available_bytes, describe_run, package_version, relative_paths

CPU = torch.device("cpu")


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """A system whose control groups are files in a folder: returns what writes the limits of one."""
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")

    def write(folder, limit, used, *, version=2, **counters):
        names = ("memory.max", "memory.current")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        folder = tmp_path / folder
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, used), strict=True):
            (folder / name).write_text(f"{value}\n")
        if counters:
            (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in counters.items()))

    return write


def test_available_memory_respects_a_container(groups):
    assert available_bytes(CPU) > 1 << 20
    groups(".", 1000, 400)
    assert available_bytes(CPU) == 600
    groups(".", 1000, 400, anon=100, inactive_file=250, active_file=50)
    assert available_bytes(CPU) == 850  # files that were read, such as the data set, make way
    groups(".", 1000, 1400, inactive_file=0)
    assert available_bytes(CPU) == 0
    groups(".", "max", 400)
    assert available_bytes(CPU) > 1 << 20
    groups(".", 1 << 60, 400)
    assert available_bytes(CPU) < 1 << 60  # no more than the machine has


@pytest.mark.parametrize("mount", [".", "unified"])
@pytest.mark.parametrize("tight", ["system.slice", "system.slice/job", "system.slice/job/step"])
def test_available_memory_respects_every_group_around_the_process(groups, tmp_path, mount, tight):
    (tmp_path / "own").write_text("0::/system.slice/job/step\n")
    for folder in ("system.slice", "system.slice/job", "system.slice/job/step", "system.slice/other"):
        groups(f"{mount}/{folder}", "max", 10)
    groups(f"{mount}/system.slice/other", 20, 10)
    assert available_bytes(CPU) > 1 << 20, "another job's limit is not this one's"
    groups(f"{mount}/{tight}", 1000, 300, inactive_file=1)
    assert available_bytes(CPU) == 701


@pytest.mark.parametrize("tight", [".", "docker", "docker/abc"])
def test_available_memory_respects_groups_of_version_1(groups, tmp_path, tight):
    (tmp_path / "own").write_text("9:name=systemd:/a\n4:cpu,memory:/docker/abc\n1:cpuset:/b\n0::/\n")
    for folder in (".", "docker", "docker/abc", "docker/other", "a", "b"):
        groups(f"memory/{folder}", (1 << 63) - 4096, 500, version=1)  # no limit
    for folder in ("docker/other", "a", "b"):
        groups(f"memory/{folder}", 20, 10, version=1)
    assert available_bytes(CPU) > 1 << 20
    groups(f"memory/{tight}", 1000, 300, version=1, inactive_file=5, total_inactive_file=100)
    assert available_bytes(CPU) == 800, "what the groups inside have read makes way, too"


@pytest.mark.parametrize("own", ["0::/../../elsewhere\n", "0::/kubepods/pod/not-shown-here\n", "", None])
def test_a_container_that_does_not_see_its_own_group_is_in_the_outermost(groups, tmp_path, own):
    if own is not None:
        (tmp_path / "own").write_text(own)
    groups(".", 1000, 400)
    groups("elsewhere", 20, 10)
    assert available_bytes(CPU) == 600


def test_groups_that_cannot_be_read_are_no_limits(groups, tmp_path):
    groups(".", "", 400)
    assert available_bytes(CPU) > 1 << 20
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory.max").mkdir()
    assert available_bytes(CPU) > 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_available_memory_respects_the_limits_of_the_process(name):
    size = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}[name]
    if size not in machine._own_sizes():
        pytest.skip(f"this system does not tell a process its {size}")
    code = f"""if True:
        import resource, torch
        from mfac_hf import machine
        available = machine.available_bytes(torch.device("cpu"))
        left = min(available, 64 << 20)
        resource.setrlimit(resource.{name}, (machine._own_sizes()["{size}"] + left,) * 2)
        found = machine.available_bytes(torch.device("cpu"))
        assert 0 <= left - found < 16 << 20, (left, found)
        resource.setrlimit(resource.{name}, (1 << 20, 1 << 20))
        print(machine.available_bytes(torch.device("cpu")))
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "0\n", result.stderr


def test_a_recorded_command_has_no_token_and_no_absolute_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py"), "--unused"])
    argv = ["--hub_token", "hf_secret", "--token=hf_secret", f"--output_dir={tmp_path / 'out'}", "--seed", "3"]
    record = describe_run(argv, torch.device("cpu"))
    assert record["command"] == ["train.py", "--hub_token", "...", "--token=...", "--output_dir=out", "--seed", "3"]
    assert describe_run(None, torch.device("cpu"))["command"] == ["train.py", "--unused"]
    assert record["versions"]["torch"] == package_version("torch") and record["threads"] == torch.get_num_threads()
    assert record["device"].startswith("cpu (") and record["peak_memory_gib"] > 0


def test_paths_inside_of_anything_become_relative():
    here = os.getcwd()
    value = {"a": f"{here}/x", "b": [f"{here}/y", 3, None], "c": "user/name"}
    assert relative_paths(value) == {"a": "x", "b": ["y", 3, None], "c": "user/name"}


def test_a_package_that_is_not_installed_has_no_version():
    assert package_version("no-such-package-as-this") is None


RANK = """
import json, os, sys, torch
from mfac_hf.machine import describe_run
found = describe_run(None, torch.device("cpu"))
if os.environ["RANK"] == "0":
    print(json.dumps({key: found.get(key) for key in ("command", "ranks", "launcher")}))
"""


@pytest.mark.slow
def test_a_run_of_several_processes_says_how_it_was_started(tmp_path):
    (tmp_path / "train.py").write_text(RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "train.py", "--lr", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["command"] == ["train.py", "--lr", "1"] and found["ranks"] == 2
    python = os.path.basename(sys.executable)
    assert found["launcher"] == f"{python} -m torch.distributed.run --nproc_per_node 2 --master_port 0"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (None, None)),
        ({"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}, (None, None)),
        ({"WORLD_SIZE": "4"}, (4, None)),  # as mpirun or a cluster starts them
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}, (4, "torchrun --nproc_per_node 4")),
        (
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"},
            (8, "torchrun --nnodes 2 --nproc_per_node 4"),
        ),
    ],
)
def test_ranks_and_launcher_are_those_of_the_environment(environment, expected, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["not-what-the-parent-started.py"])
    found = describe_run([], CPU)
    assert (found.get("ranks"), found.get("launcher")) == expected
