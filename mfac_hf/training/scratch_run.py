"""A run that trains a new model on a task made by its script: from the flags to ``results.json``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from mfac_hf.callbacks import MFACLoggingCallback, MFACWindowCallback
from mfac_hf.checkpoints import WholeCheckpoints
from mfac_hf.hub.run_records import write_results
from mfac_hf.loss_scale import correct_loss_scale
from mfac_hf.training.arguments import (
    OptimizerArguments,
    OptimizerMaker,
    build_optimizer,
    find_checkpoint,
    parse_args,
    require_action,
)
from mfac_hf.training.curve import LossCurveCallback

__all__ = ["ScratchTask", "hold_out", "run_from_scratch"]


@dataclass
class ScratchTask:
    """What a script makes of its flags and a seed."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    evaluation: Dataset
    collator: Any
    selection_metric: str
    compute_metrics: Any = None


def run_from_scratch(
    data_arguments: type[Any],
    make_task: Callable[[Any, TrainingArguments], ScratchTask],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    make_optimizer: OptimizerMaker = build_optimizer,
) -> dict[str, Any]:
    """Train and evaluate through an unmodified Trainer, and write ``results.json`` into the output directory.

    Args:
        data_arguments: the script's own dataclass of flags.
        make_task: makes data and model of these flags and Trainer's.
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.
        description: text above the flags in ``--help``.
        make_optimizer: makes the optimizer of the model and the flags.

    Returns:
        The results that the file has: Trainer's ``train_*`` and ``eval_*`` values, the curve of the training
        (`mfac_hf.training.curve.Curve`), and the name and value of the metric that selects models.
    """
    started = time.perf_counter()
    arguments = parse_args(data_arguments, OptimizerArguments, TrainingArguments, argv=argv, description=description)
    data_args, optimizer_args, training_args = arguments
    require_action(training_args)
    checkpoint = find_checkpoint(training_args)
    task = make_task(data_args, training_args)
    optimizer = make_optimizer(task.model, optimizer_args, training_args) if training_args.do_train else None
    trainer = Trainer(
        model=task.model,
        args=training_args,
        train_dataset=task.train,
        eval_dataset=task.evaluation,
        processing_class=task.tokenizer,
        data_collator=task.collator,
        compute_metrics=task.compute_metrics,
        optimizers=(optimizer, None),
    )
    MFACLoggingCallback.attach(trainer)
    results: dict[str, Any] = {}
    if training_args.do_train:
        correct_loss_scale(trainer)
        trainer.add_callback(MFACWindowCallback(checkpoint))
        WholeCheckpoints.attach(trainer)
        curve = LossCurveCallback.attach(trainer).recorder.curve
        results = {**trainer.train(resume_from_checkpoint=checkpoint).metrics, "curve": curve}
        trainer.save_model()
        trainer.save_state()
    if training_args.do_eval:
        results |= trainer.evaluate()
        results |= {"selection_metric": task.selection_metric, "selection_value": results[task.selection_metric]}
    if trainer.is_world_process_zero():
        write_results(str(training_args.output_dir), results, arguments=arguments, argv=argv, started=started)
    return results


def hold_out(train: Dataset, validation: Dataset, fraction: float | None) -> tuple[Dataset, Dataset]:
    """The splits to train on and to evaluate: for tuning, two parts of the training split.

    Args:
        train: examples in random order.
        validation: what a final run is judged on.
        fraction: of the training split, its last examples are held out; None for the validation split.

    Raises:
        ValueError: the fraction leaves one part empty.
    """
    if fraction is None:
        return train, validation
    count = round(fraction * len(train))
    if not 0 < count < len(train):
        raise ValueError(
            f"--holdout_fraction {fraction}: of {len(train)} training examples that holds out {count}; expected a "
            "fraction between 0 and 1 that leaves some on both sides"
        )
    rest = len(train) - count
    return train.select(range(rest)), train.select(range(rest, len(train)))
