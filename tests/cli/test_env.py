"""The `mfac` command: what it prints, its exit codes, and that it starts quickly."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch

from mfac_hf import cli
from mfac_hf.cli import env
from mfac_hf.ops import build, build_tools, cuda_toolkit


def run_mfac(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a fresh process, as accelerate's device choice holds for the rest of a process."""
    code = "import sys; from mfac_hf.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.fixture
def report() -> dict:
    """A report of a complete machine with one GPU."""
    tool = {"path": "/usr/bin/tool", "version": "1.0"}
    return {
        "versions": {"python": "3.11", "torch_cuda": "13.0", **dict.fromkeys(env.PACKAGES, "1.0")},
        "cpu": {
            "name": "A CPU",
            "physical_cores": 4,
            "logical_cores": 8,
            "torch_threads": 4,
            "memory_gib": 32.0,
            "available_gib": 16.0,
        },
        "cuda": [{"name": "A [big] GPU", "memory_gib": 80.0, "compute_capability": "9.0"}],
        "accelerate_device": "cuda",
        "native_kernels": {"cpu": "in use", "cuda": "built at first use, in [there]"},
        "tools": {"ninja": tool, "cxx": tool, "nvcc": tool},
    }


@pytest.mark.slow
def test_json_report_holds_the_facts():
    result = run_mfac("env", "--json", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    for package in ("mfac_hf", "torch", "transformers", "datasets", "accelerate", "evaluate"):
        assert report["versions"][package] == importlib.metadata.version(package)
    assert report["versions"]["torch_cuda"] == torch.version.cuda
    assert report["accelerate_device"] == "cpu"
    assert len(report["cuda"]) == torch.cuda.device_count()
    assert report["cpu"]["name"] and report["cpu"]["torch_threads"] == 1
    assert 0 < report["cpu"]["available_gib"] <= report["cpu"]["memory_gib"]
    assert set(report["native_kernels"]) == {"cpu"}, "no other device is used"
    assert set(report["tools"]) == {"ninja", "cxx", "nvcc"}
    assert report["tools"]["ninja"] is not None, "ninja is a dependency of the package"
    assert all(set(entry) == {"what", "so"} for entry in report["missing"])
    assert ("CUDA device" in [entry["what"] for entry in report["missing"]]) == (not report["cuda"])


@pytest.mark.slow
def test_unusable_device_is_one_line_and_exit_code_2():
    result = run_mfac("env", ACCELERATE_TORCH_DEVICE="toaster")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("mfac env: error: accelerate cannot choose a device")
    assert "'ACCELERATE_TORCH_DEVICE': 'toaster'" in result.stderr
    assert "Traceback" not in result.stderr


def test_library_that_does_not_load_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "psutil", None)  # makes `import psutil` raise ImportError
    assert cli.main(["env"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mfac env: error: import of psutil halted")
    assert "pip install mfac_hf" in captured.err


@pytest.mark.slow
def test_build_option_builds_for_the_device_and_reports(tmp_path):
    """With a shell script as compiler: what a real one makes is tests/test_build.py's matter."""
    if build_tools.find_ninja() is None:
        pytest.skip("needs ninja: pip install ninja")
    compiler = tmp_path / "my++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" ] && [ "$1" != "-o" ]; do shift; done\n[ -z "$2" ] || : > "$2"\n')
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "MFAC_CACHE": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "true"}
    result = run_mfac("env", "--build", "--json", **environment, MFAC_NATIVE="auto")
    assert result.returncode == 0, result.stderr
    (library,) = tmp_path.glob("cache/cpu-*/mfac_cpu.so")
    assert json.loads(result.stdout)["native_kernels"] == {"cpu": f"built, in {library.parent}"}


@pytest.mark.parametrize("mode", ["auto", "force", "off"])
def test_build_option_that_fails_is_one_line_and_exit_code_2(mode, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(env, "_accelerate_device", lambda: "cpu")
    monkeypatch.setenv("MFAC_NATIVE", mode)
    monkeypatch.setenv("CXX", "nothing++")
    monkeypatch.setenv("MFAC_CACHE", str(tmp_path / "cache"))
    assert cli.main(["env", "--build"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mfac env: error: no C++ compiler was found (CXX is 'nothing++')")
    assert not (tmp_path / "cache").exists()


def test_build_option_for_a_device_without_kernels(monkeypatch, capsys):
    monkeypatch.setattr(env, "_accelerate_device", lambda: "abacus:1")
    assert cli.main(["env", "--build"]) == 2
    assert capsys.readouterr().err == "mfac env: error: there are no native kernels for abacus\n"


def test_kernels_are_reported_for_the_cpu_and_the_device(monkeypatch):
    monkeypatch.setattr(env, "_accelerate_device", lambda: "abacus:1")
    monkeypatch.setattr(build, "_outcome", {"cpu": "a reason"})
    monkeypatch.delenv("MFAC_NATIVE", raising=False)
    kernels = env.environment()["native_kernels"]
    assert kernels == {"cpu": "a reason", "abacus": "there are no native kernels for abacus"}


def test_wrong_mode_of_the_kernels_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(env, "_accelerate_device", lambda: "cpu")
    monkeypatch.setattr(build, "_outcome", {})
    monkeypatch.setenv("MFAC_NATIVE", "yes")
    assert cli.main(["env"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "mfac env: error: MFAC_NATIVE is 'yes'; expected auto, force or off\n"


@pytest.mark.parametrize("arguments", [[], ["brew"], ["env", "--xml"]])
def test_wrong_arguments_end_with_code_2_and_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: mfac")


def test_command_starts_without_torch_and_hugging_face():
    heavy = {"torch", "transformers", "datasets", "accelerate", "evaluate", "numpy", "rich"}
    # By path: what the package itself imports is tests/test_import.py's matter.
    code = (
        f"import runpy, sys; main = runpy.run_path({cli.__file__!r})['main']\n"
        "try: main(['--help'])\n"
        f"except SystemExit as stop: print(stop.code, sorted({heavy} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "env" in result.stdout
    assert result.stdout.splitlines()[-1] == "0 []"


def test_console_script_is_declared():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="mfac")
    assert [script.value for script in scripts] == ["mfac_hf.cli:main"]


def test_nothing_is_missing_from_a_complete_machine(report, capsys):
    pytest.importorskip("matplotlib", reason="its absence would be listed as missing")
    assert env._missing(report) == []
    env._print_tables({**report, "missing": []})
    assert "Nothing is missing." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "name", "what", "so"),
    [
        ("versions", "mfac_hf", "mfac_hf", "pip install -e ."),
        ("versions", "datasets", "datasets", "pip install datasets"),
        ("tools", "ninja", "ninja", "pip install ninja"),
        ("tools", "cxx", "C++ compiler", "CXX"),
        ("tools", "nvcc", "nvcc", "CUDA_HOME"),
    ],
)
def test_each_absence_is_named_with_its_way_out(report, section, name, what, so):
    report[section][name] = None
    (entry,) = [entry for entry in env._missing(report) if entry["what"] != "matplotlib"]
    assert entry["what"] == what
    assert so in entry["so"]


def test_machine_without_cuda_needs_no_nvcc(report, monkeypatch):
    monkeypatch.setattr(env.shutil, "which", lambda *arguments, **options: None)
    report.update(cuda=[], accelerate_device="mps")
    report["tools"]["nvcc"] = None
    (entry,) = [entry for entry in env._missing(report) if entry["what"] != "matplotlib"]
    assert entry == {"what": "CUDA device", "so": "training runs on mps"}


def test_gpu_under_a_cpu_build_of_torch_is_pointed_out(report, monkeypatch):
    monkeypatch.setattr(env.shutil, "which", lambda *arguments, **options: "/usr/bin/nvidia-smi")
    report.update(cuda=[])
    report["versions"]["torch_cuda"] = None
    assert "this torch is built without CUDA" in env._missing(report)[0]["so"]


def test_tables_show_every_fact(report, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    report["tools"]["nvcc"] = None
    env._print_tables({**report, "missing": [{"what": "nvcc", "so": "nothing [much]"}]})
    printed = capsys.readouterr().out
    facts = ["transformers", "A CPU", "32.0 GiB", "A [big] GPU", "80.0 GiB", "not found", "nothing [much]"]
    for text in [*facts, "cpu kernels", "in use", "cuda kernels", "built at first use, in [there]"]:
        assert text in printed


def test_tools_are_found_where_they_are_named(tmp_path, monkeypatch):
    for name in ("nvcc", "my++"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\necho 'name, copyright'\necho 'tools, release 13.0, V13.0.1'\n")
        program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_toolkit.find_nvcc() == str(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert cuda_toolkit.find_nvcc() is None, "another toolkit than the one named must not stand in for it"
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CXX", "my++ -O3")
    compiler = str(tmp_path / "bin" / "my++")
    assert build_tools.find_compiler() == compiler
    assert env._tool(compiler) == {"path": compiler, "version": "tools, release 13.0, V13.0.1"}


def test_tool_that_does_not_run_says_so(tmp_path):
    broken = tmp_path / "ninja"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    assert env._tool(str(broken))["version"].startswith("does not run: ")
    assert env._tool(None) is None
