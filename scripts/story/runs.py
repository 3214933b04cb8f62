"""Train, prune and save the model of the demonstration, each through an unmodified Trainer."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from train_toy import ToyArguments, make_task
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mfac_hf import MFAC, MFACPruningCallback, SparsitySchedule, load_sparse, save_sparse
from mfac_hf.pruning import PruningOptions
from mfac_hf.training.arguments import flag
from mfac_hf.training.curve import Curve, LossCurveCallback, final_loss
from mfac_hf.training.scratch_run import ScratchTask

__all__ = ["DemoArguments", "Files", "Run", "load_task", "prune", "save", "train", "training_arguments"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "mfac": MFAC}
PRUNINGS = 4
RECOMPUTATIONS = 2  # in each pruning, as in the studies of gradual pruning; the default of 16 would take minutes


@dataclass
class DemoArguments:
    """What to run; the defaults take about three minutes on an idle core."""

    steps: int = flag(250, "Optimizer steps of each training.")
    seed: int = flag(0, "First seed, which decides data, weights and order.")
    seeds: int = flag(3, "Number of seeds; with one, nothing tells a difference from chance.")
    output_dir: str = flag("outputs/demo", "Directory for results.json, demo.png and the saved model.")
    batch_size: int = flag(128, "Sentences in a step.")
    num_validation: int = flag(1024, "Sentences to validate on.")
    hidden_size: int = flag(64, "Width of the BERT.")
    learning_rate: float = flag(1.5e-3, "Of both optimizers: AdamW's best of benchmarks/studies/demo-rates.yaml.")
    sparsity: float = flag(0.8, "Share of the encoder's weights to prune.")
    prune_steps: int = flag(25, "Optimizer steps in which it is pruned.")

    def __post_init__(self) -> None:
        """Refuse what nothing downstream would refuse clearly."""
        least = {"steps": 1, "seeds": 1, "batch_size": 1, "num_validation": 1, "prune_steps": PRUNINGS + 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name} is {getattr(self, name)}; expected at least {value}")
        if (sentences := self.prune_steps * self.batch_size) < PruningOptions.num_grads:
            raise ValueError(
                f"--prune_steps {self.prune_steps} x --batch_size {self.batch_size} are {sentences} sentences; "
                f"the pruner takes gradients of {PruningOptions.num_grads}: raise one of the two"
            )
        if not 0 < self.sparsity < 1:
            raise ValueError(f"--sparsity is {self.sparsity}; expected a share between 0 and 1, such as 0.8")


@dataclass
class Run:
    """One training, as measured.

    Attributes:
        name: ``adamw`` or ``mfac``; of a pruning ``magnitude`` or ``mfac``.
        seed: of data, weights and order.
        train_loss: mean loss of the last tenth of the steps.
        validation_accuracy: at the end.
        cpu_seconds: of the steps, prunings included and evaluations left out.
        curve: training loss by step.
        accuracies: (step, sparsity of the encoder, validation accuracy).
    """

    name: str
    seed: int
    train_loss: float
    validation_accuracy: float
    cpu_seconds: float
    curve: Curve
    accuracies: list[tuple[int, float, float]]


@dataclass
class Files:
    """The files of one pruned model, in bytes, and how far the outputs of the loaded one are from its own."""

    dense: int
    sparse: int
    largest_difference: float


class ProgressBar(ProgressCallback):
    """Trainer's progress bar, which shows the latest figures itself instead of a printed line for each log."""

    def __init__(self) -> None:
        """Start with nothing to show."""
        super().__init__()
        self.figures: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the newest loss and accuracy."""
        self.figures |= {name: value for name, value in (logs or {}).items() if name in ("loss", "eval_accuracy")}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.figures)


def training_arguments(seed: int, steps: int, eval_steps: int, args: DemoArguments) -> TrainingArguments:
    """Trainer's settings, the same for all that is compared."""
    return TrainingArguments(
        output_dir=args.output_dir,
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=128,
        weight_decay=0.01,
        warmup_steps=0.1,
        logging_steps=max(1, steps // 50),
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),  # warns where there is no such device
        seed=seed,
        logging_nan_inf_filter=False,  # a diverging run must look like one
    )


def load_task(seed: int, args: DemoArguments) -> ScratchTask:
    """Untrained model and sentences, so many that no training step sees one twice."""
    sentences = (args.steps + args.prune_steps) * args.batch_size
    toy = ToyArguments(num_train=sentences, num_validation=args.num_validation, hidden_size=args.hidden_size)
    task = make_task(toy, training_arguments(seed, args.steps, 1, args))
    lengths = [len(tokens) for tokens in task.evaluation["input_ids"]]
    return replace(task, evaluation=task.evaluation.select(np.argsort(lengths)))  # less padding, half of the time


def make_trainer(
    task: ScratchTask,
    model: PreTrainedModel,
    sentences: Dataset,
    optimizer: str,
    settings: TrainingArguments,
    lr: float,
) -> Trainer:
    """A Trainer with one of the two optimizers, whose class and learning rate are all that differs."""
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=sentences,
        eval_dataset=task.evaluation,
        data_collator=task.collator,
        compute_metrics=task.compute_metrics,
        optimizer_cls_and_kwargs=(OPTIMIZERS[optimizer], {"lr": lr}),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBar)
    return trainer


def run(trainer: Trainer, name: str, schedule: SparsitySchedule | None = None) -> Run:
    """Train and measure."""
    curve = LossCurveCallback.attach(trainer).recorder.curve
    trainer.train()
    # An evaluation at a step comes before the pruning at that step.
    accuracies = [
        (int(entry["step"]), schedule.sparsity_at(entry["step"] - 1) if schedule else 0.0, entry["eval_accuracy"])
        for entry in trainer.state.log_history
        if "eval_accuracy" in entry
    ]
    return Run(
        name=name,
        seed=trainer.args.seed,
        train_loss=final_loss(curve),
        validation_accuracy=accuracies[-1][2],
        cpu_seconds=curve["cpu_seconds"][-1],
        curve=curve,
        accuracies=accuracies,
    )


def train(name: str, seed: int, task: ScratchTask, args: DemoArguments) -> tuple[Run, PreTrainedModel]:
    """Train a copy of the task's model with one optimizer."""
    sentences = task.train.select(range(args.steps * args.batch_size))
    settings = training_arguments(seed, args.steps, max(1, args.steps // 5), args)
    model = copy.deepcopy(task.model)
    return run(make_trainer(task, model, sentences, name, settings, args.learning_rate), name), model


def prune(
    method: str, seed: int, task: ScratchTask, trained: PreTrainedModel, args: DemoArguments
) -> tuple[Run, PreTrainedModel]:
    """Prune a copy of a trained model by one method while M-FAC trains it on, on sentences that it has not seen."""
    every = args.prune_steps // (PRUNINGS + 1)
    schedule = SparsitySchedule.cubic(final=args.sparsity, end=PRUNINGS * every, every=every)
    sentences = task.train.select(range(args.steps * args.batch_size, len(task.train)))
    settings = training_arguments(seed, args.prune_steps, every, args)
    model = copy.deepcopy(trained)
    trainer = make_trainer(task, model, sentences, "mfac", settings, args.learning_rate)
    callback: TrainerCallback = MFACPruningCallback(schedule, method=method, recomputations=RECOMPUTATIONS)
    trainer.add_callback(callback)
    return run(trainer, method, schedule), model


def save(seed: int, task: ScratchTask, pruned: PreTrainedModel, args: DemoArguments) -> Files:
    """Save a pruned model, load its sparse file again, and compare the outputs of the two."""
    folder = Path(args.output_dir) / "model"
    sparse = save_sparse(pruned, folder)
    loaded = load_sparse(folder, AutoModelForSequenceClassification)
    settings = training_arguments(seed, 1, 1, args)
    outputs = [
        make_trainer(task, model, task.train, "mfac", settings, args.learning_rate)
        .predict(task.evaluation)
        .predictions
        for model in (pruned, loaded)
    ]
    return Files(
        dense=(folder / "model.safetensors").stat().st_size,
        sparse=sparse.stat().st_size,
        largest_difference=float(np.abs(outputs[0] - outputs[1]).max()),
    )
