"""The check of a GPU machine: what fails is recorded and ends nothing else, and a rehearsal says that it is one."""

import importlib
import json

import gpu_check
import pytest
import torch
from gpu.part import Part

# Takes the place of the program in the processes of the parts, on a machine that lacks what not every one has.
STAND_IN = """
import os, sys, time
for name in ("datasets", "evaluate", "rich"):
    sys.modules[name] = None
sys.path.insert(0, {scripts!r})
import gpu_check
from gpu.part import NotCheckedError, Part, require

def good(context):
    print("| a table |")
    return {{"rehearsal": context.rehearsal, "scratch": os.listdir(context.scratch)}}

def absent(context):
    raise NotCheckedError("it needs a tool")

def wrong(context):
    require(False, "two numbers | differ")

def gone(context):
    os._exit(7)

def breaks_at_the_end(context):
    import atexit
    atexit.register(os._exit, 9)

def hangs(context):
    os.fork()
    time.sleep(600)

last = good

gpu_check.PARTS += [Part(name, "says", f"__main__:{{name}}", 60) for name in globals() if not name.startswith("_")]
sys.exit(gpu_check.main())
"""


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Runs the program with some parts; its status, its report and its page."""
    program = tmp_path / "program.py"
    program.write_text(STAND_IN.format(scripts=str(gpu_check.PROGRAM.parent)))
    monkeypatch.setattr(gpu_check, "PROGRAM", program)

    def run(parts, *arguments):
        monkeypatch.setattr(gpu_check, "PARTS", parts)
        status = gpu_check.main(["--device", "cpu", "--output", str(tmp_path / "out"), *arguments])
        report = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
        return status, report["parts"], (tmp_path / "out" / "gpu_check.md").read_text()

    return run


def part(name, limit=60, **options):
    return Part(name, "says", f"__main__:{name}", limit, **options)


@pytest.mark.slow
def test_what_fails_hangs_or_dies_is_recorded_and_the_others_run(check, tmp_path):
    names = ("good", "absent", "wrong", "gone", "breaks_at_the_end")
    status, parts, page = check([*map(part, names), part("hangs", 3), part("last")])
    assert status == 1
    failed = {name for name in parts if parts[name]["status"] == "failed"}
    assert failed == {"wrong", "gone", "breaks_at_the_end", "hangs"}
    assert parts["good"]["figures"] == {"rehearsal": True, "scratch": []} and parts["last"]["status"] == "passed"
    assert parts["absent"]["status"] == "not checked" and parts["absent"]["reason"] == "it needs a tool"
    assert parts["wrong"]["reason"] == "AssertionError: two numbers | differ"
    assert parts["gone"]["reason"] == "ended with status 7"
    assert parts["breaks_at_the_end"]["reason"] == "did its work and then ended with status 9"
    assert parts["hangs"]["reason"] == "was not done after 3 seconds"
    assert "**A rehearsal on a CPU" in page and "two numbers \\| differ" in page
    assert "## good\n\n| a table |\n" in page
    assert "in wrong\n" in (tmp_path / "out" / "gpu_check.log").read_text()


def test_figures_alone_decide_nothing_and_what_is_not_reached_has_failed(check):
    assert check([part("absent"), part("wrong", measures=True)])[0] == 0
    status, parts, _ = check([part("good")], "--minutes", "0")
    assert status == 1 and parts["good"]["reason"] == "no time was left of 0 minutes"


def test_without_a_gpu_nothing_is_claimed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--output", str(tmp_path / "out")]) == 2
    assert "sees no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_parts_are_there_and_fit_into_the_time():
    for each in gpu_check.PARTS:
        module, _, name = each.run.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
    kernels, training = importlib.import_module("gpu.kernels"), importlib.import_module("gpu.training")
    for file in (*kernels.OPERATORS, *training.OPTIMIZER_TESTS, *training.PRUNING_TESTS):
        assert (gpu_check.ROOT / file).is_file()


@pytest.mark.slow
def test_the_window_in_host_memory_is_rehearsed(check, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    host = next(each for each in gpu_check.PARTS if each.name == "host")
    status, parts, page = check([host], "--minutes", "40")
    assert status == 0 and parts["host"]["figures"]["float32"]["dots_off"] < 1e-6 and "pass / sum" in page


@pytest.mark.slow
def test_a_part_runs_without_datasets_evaluate_and_rich(check, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    resume = next(each for each in gpu_check.PARTS if each.name == "resume")
    status, parts, _ = check([resume], "--minutes", "40")
    assert status == 0 and parts["resume"]["figures"] == {"off": 0.0, "equal_bits": True}
