"""Check a machine with a GPU in one command: ``python scripts/gpu_check.py --output DIR``, 8 minutes at most.

    python scripts/gpu_check.py --output outputs/gpu                      # everything
    python scripts/gpu_check.py --output outputs/gpu --parts kernels cost  # some parts
    python scripts/gpu_check.py --output outputs/gpu --sst2 DATA MODEL    # the epoch on SST-2, from files on disk
    python scripts/gpu_check.py --output outputs/rehearsal --device cpu   # a rehearsal: the same code, small sizes

One part after another, each in a process of its own with its own time limit: what fails, hangs or ends the process is
recorded, and the next part runs. ``gpu_check.json`` has the figures, ``gpu_check.md`` the tables, ``gpu_check.log``
what the parts said besides. The exit status is 0 if every check passed, 1 if one failed or was not reached in time,
and 2 where there is no GPU. What could not be checked, and why, stands in the report: a rehearsal says of itself that
it checked no GPU.

Needs torch, transformers, accelerate and pytest; no network, no files, and neither ``datasets``, ``evaluate`` nor
``rich``. Data are generated. ``--sst2`` takes a folder in the layout of GLUE on the Hub, and a BERT.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of Hugging Face, which reads it once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MFAC_NATIVE", "force")  # without the kernels there would be little to check

from gpu.part import Context, NotCheckedError, Part  # noqa: E402

from mfac_hf.storage import write_json, write_text  # noqa: E402

PROGRAM = Path(__file__).resolve()
# Of an H100, on which the limits below were sized; more minutes lengthen each in proportion.
MINUTES = 8.0
# Those that the others rest on come first: what the time runs out for is at the end.
PARTS = [
    Part("build", "kernels are built for the device that accelerate chose", "gpu.kernels:build_kernels", 90),
    Part("operators", "every operator against float64", "gpu.kernels:run_operator_tests", 90),
    Part("kernels", "published shapes, NaN in memory, repeats, streams, graphs", "gpu.kernels:check_kernels", 60),
    Part("sanitizer", "compute-sanitizer on the kernels", "gpu.kernels:sanitize", 75),
    Part("optimizer", "the tests of the optimizer and its window", "gpu.training:run_optimizer_tests", 110),
    Part("host", "a window in host memory: bits, and copies beside computing", "gpu.host_window:stream_from_host", 60),
    Part("precisions", "Trainer in fp32, bf16, fp16; a step in autocast", "gpu.training:train_in_precisions", 75),
    Part("resume", "a checkpoint of a CPU goes on on the device", "gpu.training:resume_from_cpu", 45),
    Part("pruning", "tests of the pruner; pruning beside the CPU's; gradual pruning", "gpu.training:prune", 90),
    Part("cost", "a step beside fused AdamW, passes beside a copy", "gpu.kernels:measure_cost", 60, measures=True),
    Part("epoch", "an epoch of SST-2, or of as many generated sentences", "gpu.training:train_epoch", 150),
]
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "datasets", "evaluate", "rich")
PASSED, FAILED, NOT_CHECKED = "passed", "failed", "not checked"


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="directory for the report")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="parts to run; default: all")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--sst2", nargs=2, metavar=("DATA", "MODEL"), help="real data for the epoch")
    parser.add_argument("--alone", metavar="PART", help=argparse.SUPPRESS)  # the process of one part
    return parser


def run_alone(part: Part, args: argparse.Namespace) -> None:
    """Run one part in this process, and write what came of it into the output directory, which is its own."""
    begun = time.perf_counter()
    result: dict[str, Any] = {"status": FAILED, "reason": "was ended"}
    try:
        context = Context(args.device, args.output / "scratch", tuple(args.sst2) if args.sst2 else None)
        module, _, name = part.run.partition(":")
        result = {"status": PASSED, "figures": getattr(importlib.import_module(module), name)(context)}
    except NotCheckedError as reason:
        result = {"status": NOT_CHECKED, "reason": str(reason)}
    except Exception as error:
        result = {"status": FAILED, "reason": f"{type(error).__name__}: {error}"}
        raise
    finally:
        result["seconds"] = time.perf_counter() - begun
        write_json(args.output / "result.json", result)


def run_part(part: Part, args: argparse.Namespace, left: float, log: Any) -> dict[str, Any]:
    """Run one part in a process of its own, which is ended with all that it started when its time is up."""
    if left <= 0:
        return {"status": FAILED, "reason": f"no time was left of {args.minutes:g} minutes", "seconds": 0.0}
    limit = min(part.limit * args.minutes / MINUTES, left)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        command = [sys.executable, str(PROGRAM), "--alone", part.name, "--device", args.device]
        command += ["--output", directory, *(["--sst2", *args.sst2] if args.sst2 else [])]
        tables = Path(directory, "tables.md")
        log.write(f"\n==== {part.name}\n")
        log.flush()
        begun = time.perf_counter()
        with open(tables, "wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=log, start_new_session=True)
            try:
                process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                pass
            finally:
                end(process)
        seconds = time.perf_counter() - begun
        written = Path(directory, "result.json")
        result: dict[str, Any] = {"status": FAILED, "seconds": seconds}
        if written.is_file():
            result = json.loads(written.read_text(encoding="utf-8"))
        if result["status"] != FAILED and process.returncode:
            result |= {"status": FAILED, "reason": f"did its work and then ended with status {process.returncode}"}
        elif "reason" not in result and result["status"] == FAILED:
            late = seconds >= limit
            result["reason"] = (
                f"was not done after {limit:.0f} seconds" if late else f"ended with status {process.returncode}"
            )
        return {**result, "tables": tables.read_text(encoding="utf-8", errors="replace").strip()}


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group, which is its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    machine = report["machine"]
    lines = ["# GPU check", "", f"`{report['command']}`", ""]
    if report["rehearsal"]:
        lines += ["**A rehearsal on a CPU with small sizes. Nothing here says anything about a GPU.**", ""]
    lines += [
        f"{machine['device']}, {machine['processor']}, Python {report['python']}, "
        + ", ".join(f"{name} {version or 'not installed'}" for name, version in report["packages"].items()),
        "",
        "| part | | seconds | |",
        "| --- | --- | --- | --- |",
    ]
    for name, result in report["parts"].items():
        # One line, with no end of a cell in it.
        reason = " ".join(result.get("reason", result["says"]).split()).replace("|", "\\|")
        status = result["status"] if result["status"] != FAILED else f"**{FAILED}**"
        lines.append(f"| {name} | {status} | {result['seconds']:.0f} | {reason[:300]} |")
    for name, result in report["parts"].items():
        if result.get("tables"):
            lines += ["", f"## {name}", "", result["tables"]]
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str | None]:
    """Versions of the packages that matter; None of those that are missing."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the parts that the flags name, write the report, and return the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.output is None:
        parser.error("name a directory for the report: --output DIR")
    if args.device not in ("cuda", "cpu"):
        parser.error(f"--device is {args.device}; expected cuda, or cpu for a rehearsal")
    if args.alone:
        (args.output / "scratch").mkdir()
        run_alone(next(part for part in PARTS if part.name == args.alone), args)
        return 0
    import torch  # here, with what else takes long: the process of a part imports what it needs
    from bench.common import describe_machine

    if args.device == "cuda" and not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        print(
            f"torch {torch.__version__} sees no GPU (it {built}), so there is nothing to check. --device cpu "
            "rehearses the parts that can run without one",
            file=sys.stderr,
        )
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in PARTS if args.parts is None or part.name in args.parts]
    report: dict[str, Any] = {
        "command": " ".join(["python", "scripts/gpu_check.py", *(sys.argv[1:] if argv is None else argv)]),
        "rehearsal": args.device != "cuda",
        "machine": describe_machine(torch.device(args.device)),
        "python": platform.python_version(),
        "packages": versions(),
        "parts": {},
    }
    begun = time.perf_counter()
    with open(args.output / "gpu_check.log", "w", encoding="utf-8") as log:
        for part in chosen:
            result = run_part(part, args, 60 * args.minutes - (time.perf_counter() - begun), log)
            report["parts"][part.name] = {"says": part.says, "measures": part.measures, **result}
            report["seconds"] = time.perf_counter() - begun
            # After each part: whoever ends this command keeps what is done.
            write_json(args.output / "gpu_check.json", report)
            write_text(args.output / "gpu_check.md", as_markdown(report))
            print(f"{part.name}: {result['status']} after {result['seconds']:.0f} s", result.get("reason", ""))
    failed = [name for name, result in report["parts"].items() if result["status"] == FAILED]
    print(f"{args.output / 'gpu_check.md'}: {len(chosen) - len(failed)} of {len(chosen)} parts without a failure")
    return int(any(not report["parts"][name]["measures"] for name in failed))


if __name__ == "__main__":
    sys.exit(main())
