"""Compare SGD, Adam and M-FAC with equal tuning: ``python scripts/study_training.py --dataset cifar10``.

They train a vision model on a part of the training images. Every optimizer has the same number of learning rates; each
is tried once and judged on 2,000 training images that are not trained on. The best is then run with every seed and
judged on the test images, by epoch and by second. Everything else is the same for all. ``--checkpoint FILE --sparse``
compares the optimizers on the survivors of a pruned model.

Each run is a line of ``OUTPUT/training.jsonl`` and is not repeated, so that a longer study can go on from the tuning
of a shorter one (``--tuning_images``, ``--tuning_nepochs``). ``OUTPUT/NAME.md`` has the table, ``OUTPUT/NAME.png`` the
curves.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import train_vision

from mfac_hf.machine import describe_run
from mfac_hf.storage import write_text
from mfac_hf.training.study import StudyLog, mean_and_deviation, new_figure, save_figure, study_parser

# By optimizer: flags, and learning rates to try. The other values of M-FAC were the best of few tries on the demo's
# task (docs/benchmarks/sst2-bert-tiny.md).
GRIDS: dict[str, tuple[list[str], list[float]]] = {
    "sgd": (["--optim", "sgd", "--momentum", "0.9", "--weightdecay", "5e-4"], [0.01, 0.03, 0.1, 0.2, 0.4]),
    "adam": (["--optim", "adam"], [2e-4, 5e-4, 1e-3, 3e-3, 1e-2]),
    "mfac": (
        "--optim mfac --ngrads 256 --damping 1e-3 --grad_decay 0.9 --normalize count --weightdecay 5e-4".split(),
        [1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
    ),
}
NUM_TUNING = 2_000


class Study:
    """The runs so far, and what all of them share."""

    def __init__(self, shared: Sequence[str], sizes: Mapping[Any, tuple[int, int]], log: Path) -> None:
        # sizes: images and epochs by phase or, for one optimizer, by (phase, optimizer).
        self.shared, self.sizes, self.log = list(shared), sizes, StudyLog(log)

    def run(self, optimizer: str, phase: str, lr: float, seed: int) -> dict[str, Any]:
        """Train once, unless that was done."""
        images, epochs = self.sizes.get((phase, optimizer)) or self.sizes[phase]
        flags = [*self.shared, "--train_images", str(images), "--nepochs", str(epochs)]
        flags += [*GRIDS[optimizer][0], "--lr", f"{lr:g}", "--seed", str(seed)]
        if phase == "tuning":
            flags += ["--holdout", str(NUM_TUNING)]
        key = {"optimizer": optimizer, "phase": phase, "lr": lr, "seed": seed, "flags": flags}
        if (found := self.log.find(**key)) is not None:
            return found
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows = train_vision.main([*flags, "--progress", "false", "--save", f"{folder}/model.pth"])
            except FloatingPointError as error:  # a learning rate that is too large is a result, the worst
                print(f"{optimizer} {lr:g}: {error}")
                rows = []
        return self.log.add(key, {"rows": rows, **describe_run(None, torch.device("cpu"))})

    def compare(self, optimizer: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """The final runs of an optimizer at its best learning rate."""
        tried = [(accuracy(self.run(optimizer, "tuning", lr, 0)), lr) for lr in GRIDS[optimizer][1]]
        return [self.run(optimizer, "final", max(tried)[1], seed) for seed in seeds]


def accuracy(run: Mapping[str, Any]) -> float:
    """Accuracy after the last epoch; 0 for a run that diverged."""
    return run["rows"][-1]["accuracy"] if run["rows"] else 0.0


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Test accuracy of each optimizer as Markdown."""
    lines = ["| optimizer | lr | accuracy | each seed | s / epoch |", "| --- | --- | --- | --- | --- |"]
    for name, runs in results.items():
        values = [100 * accuracy(run) for run in runs]
        seconds = statistics.mean(row["seconds"] for run in runs for row in run["rows"])
        each = ", ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {name} | {runs[0]['key']['lr']:g} | {mean_and_deviation(values)} | {each} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Accuracy by epoch and by second of training, where matplotlib is installed."""
    if (figure := new_figure(10, 4)) is None:
        return
    by_epoch, by_second = figure.subplots(1, 2, sharey=True)
    for number, (name, runs) in enumerate(results.items()):
        for run in runs:
            seconds, spent = [], 0.0
            for row in run["rows"]:
                spent += row["seconds"]
                seconds.append(spent)
            values = [row["accuracy"] for row in run["rows"]]
            label = name if run is runs[0] else None
            by_epoch.plot(range(1, len(values) + 1), values, color=f"C{number}", label=label)
            by_second.plot(seconds, values, color=f"C{number}")
    by_epoch.set(xlabel="epoch", ylabel="test accuracy")
    by_second.set(xlabel="seconds of training")
    by_epoch.legend()
    save_figure(figure, path, dpi=120)


def main(argv: Sequence[str] | None = None) -> str:
    """Run what is missing, and return the table."""
    parser = study_parser(__doc__)
    parser.add_argument("--dataset", default="digits", help="as in train_vision.py (default: digits)")
    parser.add_argument("--model", default="resnet20", help="as in train_vision.py (default: resnet20)")
    parser.add_argument("--nepochs", type=int, default=10, help="epochs of a final run (default: 10)")
    parser.add_argument(
        "--train_images", type=int, default=10_000, help="images to train on in a final run (default: 10000)"
    )
    parser.add_argument("--tuning_nepochs", type=int, default=None, help="epochs of a tuning run (default: --nepochs)")
    parser.add_argument(
        "--tuning_images", type=int, default=None, help="images to train on in a tuning run (default: --train_images)"
    )
    parser.add_argument(
        "--mfac_tuning_nepochs",
        type=int,
        default=None,
        help="epochs of a tuning run of M-FAC, whose window may fill later (default: --tuning_nepochs)",
    )
    parser.add_argument("--checkpoint", default=None, help="file of weights to start from")
    parser.add_argument("--sparse", action="store_true", help="train the survivors of a pruned checkpoint")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of final runs (default: 0 1 2)")
    parser.add_argument(
        "--optimizers", nargs="+", default=list(GRIDS), choices=list(GRIDS), help="optimizers to run (default: all)"
    )
    parser.add_argument(
        "--name", default="training-resnet20", help="name of table and picture (default: training-resnet20)"
    )
    args = parser.parse_args(argv)
    shared = ["--model", args.model, "--dataset", args.dataset]
    shared += [] if args.checkpoint is None else ["--checkpoint", args.checkpoint]
    shared += ["--sparse"] if args.sparse else []
    for name in ("tuning_images", "tuning_nepochs", "mfac_tuning_nepochs"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: expected at least 1")
    tuning = (args.tuning_images or args.train_images, args.tuning_nepochs or args.nepochs)
    sizes: dict[Any, tuple[int, int]] = {"tuning": tuning, "final": (args.train_images, args.nepochs)}
    sizes["tuning", "mfac"] = (tuning[0], args.mfac_tuning_nepochs or tuning[1])
    study = Study(shared, sizes, args.output / "training.jsonl")
    results = {optimizer: study.compare(optimizer, args.seeds) for optimizer in args.optimizers}
    text = table(results)
    write_text(args.output / f"{args.name}.md", text)
    draw(results, args.output / f"{args.name}.png")
    print(text)
    return text


if __name__ == "__main__":
    main()
