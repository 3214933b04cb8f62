r"""Prune a vision model: ``python scripts/prune_vision.py --model resnet20 --checkpoint FILE --dataset DATASET …``.

Gradual pruning with training in between, through the flags of the M-FAC paper's own script, or one-shot pruning with
``--nepochs 0``:

    python scripts/prune_vision.py --model resnet20 --checkpoint resnet20_cifar10.pth.tar --data DATASET --nepochs 10 \
        --optim sgd --lr .005 --momentum .9 --batchsize 128 --drop_at 7 9 --pruner mfac --blocksize 128 \
        --nrecomps 16 --ngrads_schedule 64 --sparsities .5 .75 .875 --prun_every 2 --prun_lrs .005 .0005 \
        --prefix experiments/rn20-test/model
    python scripts/prune_vision.py --model resnet20 --checkpoint FILE --data DATASET --nepochs 0 --sparsities .5 .7 .9

DATASET is ``cifar10``, a name on the Hub, a local directory laid out like the Hub repository, or a folder of images;
without it, scikit-learn's digits.

The first pruning step comes before the first epoch, and the others follow ``--prun_every`` epochs apart. Until the
last one, the learning rate cycles through ``--prun_lrs``; from then on it is ``--lr``, which drops at the epochs
``--drop_at``, counted over all epochs. The defaults are our procedure; ``--fisher empirical --selection diagonal
--update sum`` is the paper's, ``--pruner mag`` is magnitude pruning, and ``--blocksize -1`` takes the inverse of the
whole Fisher.

``PREFIX.csv`` and ``PREFIX.json`` have the time of every pruning step and epoch and the accuracy after it, as the
model is and with re-estimated batch norms. ``PREFIX.png`` shows accuracy over sparsity. ``PREFIX-prune-XXX.pth`` and
``PREFIX-last.pth`` are the models and their masks. ``--resume`` continues a run that was cut off.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mfac_hf.defaults import PRUNING_DAMPING_TEXT
from mfac_hf.fisher import BlockedFisher
from mfac_hf.machine import describe_run
from mfac_hf.pruning.engine import prune_to
from mfac_hf.pruning.gradients import DataLoaderGradients
from mfac_hf.pruning.masks import MaskSet
from mfac_hf.pruning.options import Fisher, PruningOptions, Scope, Selection, Update
from mfac_hf.pruning.schedule import SparsitySchedule
from mfac_hf.pruning.trainer.distillation import copy_model, distillation_loss
from mfac_hf.training.arguments import flag, parse_args
from mfac_hf.training.study import new_figure, save_figure
from mfac_hf.training.vision_arguments import (
    VisionArguments,
    build_optimizer,
    build_run,
    initial_masks,
    model_state,
    set_learning_rate,
)
from mfac_hf.training.vision_run import RunLog, VisionRun, learning_rate_plan, load_state, logits_of
from mfac_hf.training.vision_window import resume_optimizer, save_state


@dataclass
class PruneArguments(VisionArguments):
    """Flags of this script."""

    nepochs: int | None = flag(None, "Epochs of training in all; 0 prunes in one go. Required.")
    sparsities: list[float] | None = flag(None, "Sparsity after each pruning step, rising. Required.")
    prefix: str = flag("experiment/model", "Beginning of the names of all files that are written.")
    adjust_sparsities: bool = flag(False, "Sparsities are shares of all parameters, not of the target weights.")
    optim: Literal["sgd", "adam", "adamw", "mfac"] = flag(
        "sgd", "Optimizer of the training between the pruning steps."
    )
    lr: float = flag(0.005, "Learning rate after the last pruning step.")
    momentum: float | None = flag(
        None, "Decay of the average of gradients (sgd) or of directions (mfac --metric identity); default: .9."
    )
    pruner: Literal["mfac", "mag"] = flag("mfac", "M-FAC, or magnitude pruning.")
    prun_every: int = flag(1, "Epochs from one pruning step to the next.")
    prun_lrs: list[float] | None = flag(None, "Learning rates to cycle through between pruning steps; default: --lr.")
    ngrads_schedule: list[int] | None = flag(
        None, f"Gradients in each recomputation: one number, or one a step; default: {PruningOptions.num_grads}."
    )
    nrecomps: int = flag(PruningOptions.recomputations, "Recomputations in each pruning step.")
    prun_batchsize: int = flag(32, "Images that each gradient is the mean of.")
    fisher: Fisher = flag(
        PruningOptions.fisher,
        "scaled divides each image's gradient by that of its loss by the logits; empirical is the paper's.",
    )
    fisher_floor: float = flag(PruningOptions.fisher_floor, "Least norm by which the scaled Fisher divides.")
    blocksize: int = flag(PruningOptions.block_size, "Weights in a block of the Fisher; -1: all weights together.")
    prundamp: float | None = flag(
        None,
        f"Damping of the Fisher; it has to scale with the gradients. Default: {PRUNING_DAMPING_TEXT}.",
    )
    perbatch: int | None = flag(
        None, "Blocks to hold at once, in whole layers; default: as many as half of the free memory holds."
    )
    pages: int = flag(1, "Pieces in which the gradients are worked on, with --blocksize -1.", "--prunpages")
    targets: list[str] | None = flag(
        None, "Regular expressions of the weights to prune; default: classifier, convolutions but 1 x 1 shortcuts."
    )
    selection: Selection | None = flag(
        None, "greedy (default with blocks) updates all costs after each removed weight; diagonal is the paper's."
    )
    update: Update = flag(
        PruningOptions.update, "Update of the survivors: joint (exact for all removed), sum (the paper's) or none."
    )
    pattern: str = flag(PruningOptions.pattern, "unstructured, 2:4 (any N:M) or block4 (any length).")
    scope: Scope = flag(
        PruningOptions.scope, "global ranks the weights of all layers together; uniform prunes all layers alike."
    )
    first_order: bool = flag(
        PruningOptions.first_order,
        "A step of the survivors down the loss after each recomputation, as long as 1,024 held-out images say.",
    )
    batch_norm_samples: int = flag(
        PruningOptions.batch_norm_samples,
        "Images that batch norms are averaged over in each recomputation; 0: not.",
    )
    reestimate_bn: Literal["none", "before", "after", "both"] = flag(
        "after", "When to keep batch norm statistics that were re-estimated on augmented training images."
    )
    bn_images: int = flag(5120, "Images to re-estimate with.")
    distillation_hardness: float = flag(
        0.0, "Share in the training loss of the dense model's outputs, from 0 (none) to 1 (they alone)."
    )
    distillation_temperature: float = flag(2.0, "Temperature that softens the outputs of both models.")

    def __post_init__(self) -> None:
        """Put defaults in place of what was not given."""
        super().__post_init__()
        if self.momentum is None and (self.optim, self.metric) != ("mfac", "adam"):
            self.momentum = 0.9

    def steps(self) -> tuple[tuple[int, float], ...]:
        """(epoch, sparsity) of each pruning step, before any adjustment.

        Raises:
            ValueError: sparsities are missing or fall, or a pruning step comes after the last epoch.
        """
        if self.nepochs is None or self.nepochs < 0:
            raise ValueError(f"--nepochs {self.nepochs}: expected a number of epochs, or 0 to prune in one go")
        for name in ("bn_images", "perbatch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} {value}: expected at least 1")
        if not 0.0 <= self.distillation_hardness <= 1.0:
            raise ValueError(f"--distillation_hardness {self.distillation_hardness}: expected 0 to 1")
        if not 0.0 < self.distillation_temperature < math.inf:
            raise ValueError(f"--distillation_temperature {self.distillation_temperature}: expected above 0")
        if not self.sparsities:
            raise ValueError("--sparsities is missing: name the sparsity of each pruning step, such as .5 .75 .875")
        points = SparsitySchedule.from_list(self.sparsities, every=self.prun_every).points
        if self.nepochs and points[-1][0] >= self.nepochs:
            raise ValueError(
                f"the pruning step to {points[-1][1]:g} would come before epoch {points[-1][0]}, and there are "
                f"{self.nepochs} (0 to {self.nepochs - 1}): raise --nepochs or lower --prun_every"
            )
        return points

    def plan(self) -> list[float]:
        """Learning rate of each epoch.

        Raises:
            ValueError: a drop lies outside the run.
        """
        if not self.nepochs:
            return []
        plan = learning_rate_plan(self.lr, self.nepochs, self.drop_at or [], self.drop_by)
        cycle = self.prun_lrs or [self.lr]
        for epoch in range(self.steps()[-1][0]):
            plan[epoch] = cycle[epoch % self.prun_every % len(cycle)]
        return plan

    def options(self, step: int, num_steps: int) -> PruningOptions:
        """The options of one pruning step.

        Raises:
            ValueError: a flag is out of range.
        """
        schedule = self.ngrads_schedule or [PruningOptions.num_grads]
        if len(schedule) not in (1, num_steps):
            raise ValueError(
                f"--ngrads_schedule has {len(schedule)} numbers for {num_steps} pruning steps: give one, or one a step"
            )
        if self.blocksize < 1 and self.blocksize != -1:
            raise ValueError(f"--blocksize {self.blocksize}: expected at least 1, or -1 for all weights together")
        selection = self.selection or ("diagonal" if self.blocksize == -1 else "greedy")
        return PruningOptions(
            method="mfac" if self.pruner == "mfac" else "magnitude",
            fisher=self.fisher,
            fisher_floor=self.fisher_floor,
            num_grads=schedule[step % len(schedule)],
            grad_batch_size=self.prun_batchsize,
            block_size=None if self.blocksize == -1 else self.blocksize,
            pages=self.pages,
            damping=self.prundamp,
            recomputations=self.nrecomps if self.pruner == "mfac" else 1,
            selection=selection,
            update=self.update,
            pattern=self.pattern,
            scope=self.scope,
            first_order=self.first_order,
            batch_norm_samples=self.batch_norm_samples,
            seed=self.seed + 1000 * step,
        )


class Pruner:
    """Prunes and trains a model: gradients of augmented images, the engine, accuracies, rows, files.

    Args:
        args: the flags.
        run: model and data.
        masks: what is pruned; updated by each pruning step.
        header: what the log holds beside its rows.
        state: where a run that was cut off stopped; None for a new run.
    """

    def __init__(
        self,
        args: PruneArguments,
        run: VisionRun,
        masks: MaskSet,
        header: Mapping[str, Any],
        state: Mapping[str, Any] | None,
    ) -> None:
        self.args, self.run, self.masks = args, run, masks
        self.source = DataLoaderGradients(
            run.gradient_loader(),
            loss_fn=run.loss,
            fisher=args.fisher,
            fisher_floor=args.fisher_floor,
            batch_size=args.prun_batchsize,
            seed=args.seed,
            process_group=None if args.blocksize == -1 else run.process_group,
        )
        # Before a state is loaded the model is the dense one.
        self.teacher = None
        if args.distillation_hardness:
            self.teacher = copy_model(run.bare_model).eval().requires_grad_(False)
        self.log = RunLog(args.prefix, header, state["rows"] if state is not None else ())
        if state is not None:
            run.bare_model.load_state_dict(state["model"])
            masks.update(state["masks"])
        masks.attach(run.bare_model)
        self.optimizer = build_optimizer(run, args.optim, args, lr=args.lr, momentum=args.momentum, masks=masks)
        if state is not None:
            resume_optimizer(f"{args.prefix}.state", state, self.optimizer)

    def measure(self, event: str, step: int, **more: Any) -> None:
        """Write a row with the accuracy as the model is, and with batch norms re-estimated."""
        keep = self.args.reestimate_bn in ("after", "both") and event == "prune"
        keep |= self.args.reestimate_bn in ("before", "both") and event == "initial"
        row = {"event": event, "step": step, "sparsity": self.masks.sparsity, **more}
        self.record(row | self.run.accuracies(self.args.bn_images, keep=keep, salt=step + 1))

    def record(self, row: dict[str, Any]) -> None:
        """Print and log a row on the main process."""
        if self.run.accelerator.is_main_process:
            shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "event"]
            print(f"{row['event']}: {', '.join(shown)}", flush=True)
            self.log.add(row)

    def prune(self, step: int, sparsity: float, options: PruningOptions) -> None:
        """Prune to a sparsity, measure, and save the model."""
        model, args = self.run.bare_model, self.args
        source = self.source if args.pruner == "mfac" else None
        report = prune_to(
            model, self.masks, source, sparsity, options, progress=args.progress, process_group=self.run.process_group
        )
        self.measure(
            "prune",
            step,
            seconds=report.seconds,
            damping=sorted({part["damping"] for part in report.steps if part["damping"] is not None}),
            num_grads=report.num_grads,
            groups=report.steps[-1]["groups"] if report.steps else 0,
            predicted_loss_increase=report.predicted_loss_increase,
        )
        self.run.save(f"{args.prefix}-prune-{round(sparsity * 1000):03d}.pth", model_state(self.run, self.masks))
        self.masks.clear_optimizer_state(model, self.optimizer)

    def distil(self, images: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """The training loss with the dense model's part in it (`mfac_hf.pruning.trainer.distillation`)."""
        assert self.teacher is not None
        with torch.no_grad():
            wanted = logits_of(self.teacher(images))
        hardness, temperature = self.args.distillation_hardness, self.args.distillation_temperature
        return (1 - hardness) * loss + hardness * distillation_loss(logits, wanted, temperature=temperature)

    def train_epoch(self, epoch: int, lr: float) -> None:
        """Train the survivors for one epoch, measure, and save the model."""
        set_learning_rate(self.optimizer, lr)
        trained = self.run.train_epoch(
            self.optimizer,
            epoch,
            lambda: self.masks.apply(self.run.bare_model),
            distil=None if self.teacher is None else self.distil,
        )
        row = {"event": "epoch", "epoch": epoch, "lr": lr, "sparsity": self.masks.sparsity, **trained}
        self.record(row | {"accuracy": self.run.evaluate()})
        self.run.save(f"{self.args.prefix}-last.pth", model_state(self.run, self.masks, epoch=epoch))

    def save(self, epoch: int, steps: int) -> None:
        """Save what it takes to go on at this epoch, after this number of pruning steps."""
        now = {"arguments": self.args.to_dict(), "epoch": epoch, "steps": steps, "rows": self.log.rows}
        now |= {"model": self.run.bare_model.state_dict(), "masks": dict(self.masks)}
        save_state(f"{self.args.prefix}.state", self.run, now, self.optimizer)


def draw_plot(log: RunLog) -> None:
    """Draw accuracy over sparsity, where matplotlib is installed."""
    if (figure := new_figure(6, 4)) is None:
        return
    axes = figure.add_subplot()
    pruned = [row for row in log.rows if row["event"] in ("initial", "prune")]
    for column, label in (("accuracy", "pruned"), ("accuracy_bn", "pruned, batch norm re-estimated")):
        axes.plot([row["sparsity"] for row in pruned], [row[column] for row in pruned], "o-", label=label)
    trained = {row["sparsity"]: row["accuracy"] for row in log.rows if row["event"] == "epoch"}
    if trained:
        axes.plot(list(trained), list(trained.values()), "s", label="after the last epoch at this sparsity")
    axes.set(xlabel="sparsity of the pruned layers", ylabel="test accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, f"{log.prefix}.png", dpi=120)


def budget(options: PruningOptions, perbatch: int, masks: MaskSet) -> PruningOptions:
    """The options with a memory budget for this number of blocks, or for the largest layer where that is more."""
    if options.block_size is None:
        return options
    weights = max(perbatch * options.block_size, *(keep.numel() for keep in masks.values()))
    bytes_ = BlockedFisher.nbytes(weights, options.block_size, options.num_grads)
    return dataclasses.replace(options, memory_budget=bytes_)


def adjusted(points: Sequence[tuple[int, float]], model: torch.nn.Module, masks: MaskSet) -> list[tuple[int, float]]:
    """Sparsities of the targets at which these are the sparsities of the whole model.

    Raises:
        ValueError: the targets are too few for that.
    """
    share = masks.numel / sum(p.numel() for p in model.parameters())
    if points[-1][1] >= share:
        raise ValueError(
            f"--adjust_sparsities: {points[-1][1]:g} of all parameters cannot be pruned; the targets are {share:.4f}"
        )
    return [(epoch, sparsity / share) for epoch, sparsity in points]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Prune as the flags say.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.

    Returns:
        A row for the beginning, each pruning step and each epoch.
    """
    args: PruneArguments = parse_args(PruneArguments, argv=argv, description=__doc__)[0]
    points, plan = args.steps(), args.plan()
    options = [args.options(step, len(points)) for step in range(len(points))]
    state = load_state(f"{args.prefix}.state", args.to_dict()) if args.resume else None
    run, checkpoint = build_run(args)
    masks = initial_masks(checkpoint, run.bare_model, args.targets)
    if args.adjust_sparsities:
        points = adjusted(points, run.bare_model, masks)
    if points[0][1] < masks.sparsity:
        raise ValueError(f"--sparsities {points[0][1]:g}: the model is {masks.sparsity:.4f} sparse already")
    if args.perbatch is not None:
        options = [budget(each, args.perbatch, masks) for each in options]
    header = {"arguments": args.to_dict(), **describe_run(argv, run.accelerator.device)}
    pruner = Pruner(args, run, masks, header, state)
    if args.pruner == "mfac":
        for each in options:
            pruner.source.check(each.num_grads)
    first, done = (state["epoch"], state["steps"]) if state is not None else (0, 0)
    if state is None:
        pruner.measure("initial", -1)
    for epoch in range(first, len(plan) or 1):
        while done < len(points) and (points[done][0] <= epoch or not plan):
            pruner.prune(done, points[done][1], options[done])
            done += 1
            pruner.save(epoch, done)
        if plan:
            pruner.train_epoch(epoch, plan[epoch])
            pruner.save(epoch + 1, done)
    if run.accelerator.is_main_process:
        draw_plot(pruner.log)
    return pruner.log.rows


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    main()
