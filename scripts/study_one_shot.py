"""Compare ways to prune ResNet-20 in one go: ``python scripts/study_one_shot.py --checkpoint FILE --dataset DATA``.

Magnitude pruning, the M-FAC paper's procedure and ours, with the empirical Fisher and the scaled one, are compared at
several sparsities and seeds, without any training afterwards. Accuracy is measured on the test images and on 5,000
training images that give no gradients, as the model is and after its batch norms were re-estimated on other training
images. For each family of methods with the empirical Fisher, damping is the best of three values at 80 % with four
recomputations, by the accuracy on 2,000 training images that serve nothing else; the scaled one has the library's.

Each result is a line of ``OUTPUT/one-shot-resnet20.jsonl`` and is not computed again, so a study that was cut off goes
on where it stopped; other ``--seeds`` and ``--methods`` add to it. ``OUTPUT/one-shot-resnet20.md`` has the table.

    python scripts/study_one_shot.py --checkpoint resnet20_cifar10.pth.tar --dataset cifar10 --seeds 0 1 2
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from mfac_hf.machine import describe_run
from mfac_hf.pruning.engine import prune_to
from mfac_hf.pruning.gradients import DataLoaderGradients
from mfac_hf.pruning.masks import MaskSet
from mfac_hf.pruning.options import PruningOptions
from mfac_hf.storage import write_text
from mfac_hf.training.study import StudyLog, mean_and_deviation, study_parser
from mfac_hf.training.vision_arguments import VisionArguments, build_run, split_images, vision_targets
from mfac_hf.training.vision_run import VisionRun

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
NUM_HELD_OUT, NUM_TUNING, NUM_BN = 5_000, 2_000, 5_120
_PAPER = {"fisher": "empirical", "selection": "diagonal", "update": "sum", "num_grads": 64, "grad_batch_size": 32}
_OURS = {"fisher": "empirical", "selection": "greedy", "update": "joint"}
_SCALED = {**_OURS, "fisher": "scaled"}
_BATCHES = {**_OURS, "num_grads": 64, "grad_batch_size": 32}
# Steps down the loss between recomputations, and batch norms that are averaged anew.
_DOWN = {**_SCALED, "grad_batch_size": 1, "first_order": True, "batch_norm_samples": 2048, "loss_samples": 512}
# 16 recomputations to 90 %, geometric but for rounding, with a stop at each sparsity: 11 of them lead to 80 %.
_PATH = {0.5: 5, 0.6: 1, 0.7: 2, 0.8: 3, 0.9: 5}
_TEN, _TWENTY, _FORTY = {0.7: 5, 0.8: 2, 0.9: 3}, {0.7: 10, 0.8: 4, 0.9: 6}, {0.7: 20, 0.8: 8, 0.9: 12}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to prune.

    Attributes:
        family: name of the methods that share a damping.
        options: fields of `PruningOptions` other than damping, seed and recomputations.
        recomputations: number of them from the dense model to each sparsity or, by sparsity, from the one before.
    """

    family: str
    options: Mapping[str, Any]
    recomputations: int | Mapping[float, int] = 1

    @property
    def images(self) -> int:
        """Images of one recomputation."""
        return int(self.options.get("num_grads", 0) * self.options.get("grad_batch_size", 0))


METHODS = {
    "magnitude": Method("magnitude", {"method": "magnitude"}),
    "paper, 1": Method("paper", _PAPER),
    "paper, 16": Method("paper", _PAPER, _PATH),
    "ours, 1 x 1024": Method("ours", {**_OURS, "num_grads": 1024, "grad_batch_size": 1}),
    "ours, 4 x 512": Method("ours", {**_OURS, "num_grads": 512, "grad_batch_size": 1}, 4),
    "ours, 8 x 512": Method("ours", {**_OURS, "num_grads": 512, "grad_batch_size": 1}, 8),
    "ours, 16 x 1000": Method("ours", {**_OURS, "num_grads": 1000, "grad_batch_size": 1}, _PATH),
    "ours, 16 x 64 batches": Method("ours, batches", _BATCHES, _PATH),
    "scaled, 1 x 1024": Method("scaled", {**_SCALED, "num_grads": 1024, "grad_batch_size": 1}),
    "scaled, 4 x 512": Method("scaled", {**_SCALED, "num_grads": 512, "grad_batch_size": 1}, 4),
    "scaled, 16 x 1000": Method("scaled", {**_SCALED, "num_grads": 1000, "grad_batch_size": 1}, _PATH),
    "first order, 10 x 512": Method("first order", {**_DOWN, "num_grads": 512}, _TEN),
    "first order, 20 x 1000": Method("first order", {**_DOWN, "num_grads": 1000}, _TWENTY),
    "first order, 40 x 500": Method("first order", {**_DOWN, "num_grads": 500}, _FORTY),
    # The parts of the first of these alone, and what else they might have been.
    "scaled, 10 x 512": Method("scaled", {**_SCALED, "num_grads": 512, "grad_batch_size": 1}, _TEN),
    "batch norms, 10 x 512": Method(
        "scaled", {**_DOWN, "first_order": False, "loss_samples": 0, "num_grads": 512}, _TEN
    ),
    "step, 10 x 512": Method("first order", {**_DOWN, "batch_norm_samples": 0, "num_grads": 512}, _TEN),
    "first order, 5 x 1024": Method("first order", {**_DOWN, "num_grads": 1024}, {0.7: 2, 0.8: 1, 0.9: 2}),
    "first order, 20 x 256": Method("first order", {**_DOWN, "num_grads": 256}, _TWENTY),
    "first order, B = 32": Method("first order", {**_DOWN, "num_grads": 512, "block_size": 32}, _TEN),
    "first order, B = 64": Method("first order", {**_DOWN, "num_grads": 512, "block_size": 64}, _TEN),
    "first order, B = 256": Method("first order", {**_DOWN, "num_grads": 512, "block_size": 256}, _TEN),
}
# By family: the method that the damping is chosen with, at 80 %, and its candidates.
TUNING = {
    "paper": (Method("paper", _PAPER, 4), (1e-6, 1e-5, 1e-4)),
    "ours": (METHODS["ours, 4 x 512"], (1e-6, 1e-5, 1e-4)),
    "ours, batches": (Method("ours, batches", _BATCHES, 4), (1e-6, 1e-5, 1e-4)),
}


class Study:
    """The dense model, the splits, and the results so far."""

    def __init__(self, run: VisionRun, log: Path, header: Mapping[str, Any]) -> None:
        self.run, self.log, self.header = run, StudyLog(log), dict(header)
        self.dense = copy.deepcopy(run.bare_model.state_dict())
        others, rest = split_images(run.data.train, NUM_HELD_OUT + NUM_TUNING, 2024)
        held_out = Subset(others, range(NUM_HELD_OUT))
        tuning = Subset(others, range(NUM_HELD_OUT, NUM_HELD_OUT + NUM_TUNING))
        run.data = dataclasses.replace(run.data, train=rest)
        run.train_loader = run.loader(rest, 128, shuffle=True)
        self.held_out, self.tuning = run.loader(held_out, 128), run.loader(tuning, 128)

    def restart(self) -> MaskSet:
        """The dense model again, and masks that keep all of it."""
        self.run.bare_model.load_state_dict(self.dense)
        return MaskSet.dense(self.run.bare_model, vision_targets(self.run.bare_model))

    def add(self, key: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Keep a result, and print its accuracies."""
        self.log.add(key, {**row, **self.header})
        print(key, {name: value for name, value in row.items() if "accuracy" in name}, flush=True)

    def prune(self, masks: MaskSet, sparsity: float, options: PruningOptions) -> dict[str, Any]:
        """Prune in one step; what it took."""
        source = DataLoaderGradients.of_options(self.run.gradient_loader(), options, self.run.loss)
        report = prune_to(self.run.bare_model, masks, source, sparsity, options, progress=False)
        return {"seconds": report.seconds, "predicted_loss_increase": report.predicted_loss_increase}

    def damping(self, family: str) -> float | None:
        """The damping of a family with the best accuracy on the tuning images; what is missing is tried now.

        None is the library's own, for families that are not tuned.
        """
        if family not in TUNING:
            return None
        method, candidates = TUNING[family]
        for damping in candidates:
            key = {"phase": "tuning", "family": family, "damping": damping}
            if self.log.find(**key) is None:
                options = PruningOptions(
                    damping=damping, seed=99, recomputations=method.recomputations, **method.options
                )
                took = self.prune(self.restart(), 0.8, options)
                self.add(key, {"accuracy": self.run.evaluate(self.tuning), **took})
        return max(candidates, key=lambda d: self.log.find(phase="tuning", family=family, damping=d)["accuracy"])

    def compare(self, name: str, sparsities: Sequence[float], seed: int) -> None:
        """Prune with one method and one seed to each sparsity, and measure."""
        method = METHODS[name]
        keys = {s: {"phase": "result", "method": name, "sparsity": s, "seed": seed} for s in sparsities}
        if all(self.log.find(**key) for key in keys.values()):
            return
        damping, masks = self.damping(method.family), self.restart()
        # What is held out, and what batch norms are averaged over, serves all recomputations.
        images = shared = sum(method.options.get(name, 0) for name in ("loss_samples", "batch_norm_samples"))
        for sparsity in sparsities:
            path = isinstance(method.recomputations, Mapping)
            if not path:
                if self.log.find(**keys[sparsity]):
                    continue
                masks, images = self.restart(), shared
            count = method.recomputations[sparsity] if path else method.recomputations
            options = PruningOptions(
                damping=damping, seed=seed + round(1000 * sparsity), recomputations=count, **method.options
            )
            took = self.prune(masks, sparsity, options)
            # The step after the last recomputation has gradients of its own.
            images += (count + method.options.get("first_order", False)) * method.images
            if self.log.find(**keys[sparsity]) is None:
                self.add(keys[sparsity], {"damping": damping, "images": images, **took, **self.measure(seed)})

    def measure(self, seed: int) -> dict[str, float]:
        """Accuracies, raw and with re-estimated batch norms; the model keeps its own statistics."""
        loaders = {"test": self.run.test_loader, "train": self.held_out}
        found = {f"{name}_accuracy": self.run.evaluate(loader) for name, loader in loaders.items()}
        with self.run.reestimated_batch_norm(NUM_BN, seed):
            found |= {f"{name}_accuracy_bn": self.run.evaluate(loader) for name, loader in loaders.items()}
        return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as Markdown: test / held-out training accuracy, raw → re-estimated, mean ± deviation over seeds."""
    results = [row for row in rows if row["key"]["phase"] == "result"]
    sparsities = sorted({row["key"]["sparsity"] for row in results})
    lines = [
        "| method | images at most | damping | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |",
        "| --- | --- | --- |" + " --- |" * len(sparsities),
    ]
    for name in METHODS:
        mine = [row for row in results if row["key"]["method"] == name]
        if not mine:
            continue
        cells = []
        for sparsity in sparsities:
            here = [row for row in mine if row["key"]["sparsity"] == sparsity]
            cells.append(_cell(here) if here else "")
        images = max(row["images"] for row in mine)
        tuned = mine[0]["damping"]
        damping = "" if name == "magnitude" else "its own" if tuned is None else f"{tuned:g}"
        lines.append(f"| {name} | {images:,} | {damping} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    def mean(name: str) -> str:
        return mean_and_deviation([100 * row[name] for row in rows])

    raw, again = (f"{mean(f'test_accuracy{bn}')} / {mean(f'train_accuracy{bn}')}" for bn in ("", "_bn"))
    return f"{raw} → {again}"


def main(argv: Sequence[str] | None = None) -> str:
    """Compute what is missing, and return the table."""
    parser = study_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="file of a dense ResNet-20")
    parser.add_argument("--dataset", required=True, help="CIFAR-10: 'cifar10' or a directory")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        choices=list(METHODS),
        metavar="METHOD",
        help=f"methods to prune with: {', '.join(map(repr, METHODS))} (default: all)",
    )
    parser.add_argument(
        "--sparsities",
        type=float,
        nargs="+",
        default=list(SPARSITIES),
        choices=SPARSITIES,
        help="sparsities to prune to (default: all)",
    )
    args = parser.parse_args(argv)
    run, _ = build_run(VisionArguments("resnet20", dataset=args.dataset, checkpoint=args.checkpoint, progress=False))
    study = Study(run, args.output / "one-shot-resnet20.jsonl", describe_run(argv, run.accelerator.device))
    for seed in args.seeds:
        for name in args.methods:
            # Nothing in magnitude pruning is random.
            study.compare(name, sorted(args.sparsities), 0 if name == "magnitude" else seed)
    text = table(study.log.rows)
    write_text(args.output / "one-shot-resnet20.md", text)
    print(text)
    return text


if __name__ == "__main__":
    main()
