"""What the machine is, and what a result file says of it."""

import os
import sys

import torch

from mfac_hf import machine
from mfac_hf.machine import available_bytes, describe_run, package_version, relative_paths


def write_limits(folder, limit, used, **counters):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    if counters:
        (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in counters.items()))


def test_available_memory_respects_a_container(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    system = available_bytes(cpu)
    assert system > 1 << 20
    write_limits(tmp_path, 1000, 400)
    assert available_bytes(cpu) == 600
    write_limits(tmp_path, 1000, 400, anon=100, inactive_file=250, active_file=50)
    assert available_bytes(cpu) == 850  # files that were read, such as the data set, make way
    write_limits(tmp_path, 1000, 1400, inactive_file=0)
    assert available_bytes(cpu) == 0
    write_limits(tmp_path, "max", 400)
    assert available_bytes(cpu) > 1 << 20
    write_limits(tmp_path, 1 << 60, 400)
    assert available_bytes(cpu) < 1 << 60  # no more than the machine has


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
