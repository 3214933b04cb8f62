"""Train on the generated task of the demonstration: ``python scripts/train_toy.py --do_train --do_eval``.

A small BERT learns the sentiment task of `mfac_hf.tasks.toy`, where word order decides, from random weights:

    python scripts/train_toy.py --do_train --do_eval --num_train_epochs 1 --per_device_train_batch_size 256 \
        --learning_rate 1e-3 --warmup_steps 0.1 --num_train 76800 --output_dir outputs/toy

The seed decides sentences, weights and order. With one epoch no sentence is seen twice, whatever the batch size, so
that runs of other batch sizes see the same ones. Nothing is downloaded. All flags of TrainingArguments work; results
go into ``results.json`` in the output directory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DataCollatorWithPadding, TrainingArguments

from mfac_hf.tasks.toy import toy_accuracy, toy_dataset, toy_features, toy_model, toy_tokenizer
from mfac_hf.training.arguments import OptimizerMaker, build_optimizer, flag
from mfac_hf.training.scratch_run import ScratchTask, hold_out, run_from_scratch


@dataclass
class ToyArguments:
    """How much data, and how large a model."""

    num_train: int = flag(32_000, "Sentences to train on.")
    num_validation: int = flag(1024, "Sentences to evaluate on.")
    hidden_size: int = flag(64, "Width of the BERT.")
    num_layers: int = flag(2, "Layers of the BERT.")
    holdout_fraction: float | None = flag(
        None, "For tuning: hold out this fraction of the training sentences and evaluate on them."
    )


def make_task(args: ToyArguments, training_args: TrainingArguments) -> ScratchTask:
    """Generate the sentences and the model."""
    splits = toy_features(toy_dataset(args.num_train, args.num_validation, seed=training_args.seed))
    train, evaluation = hold_out(splits["train"], splits["validation"], args.holdout_fraction)
    tokenizer = toy_tokenizer()
    return ScratchTask(
        model=toy_model(seed=training_args.seed, hidden_size=args.hidden_size, num_layers=args.num_layers),
        tokenizer=tokenizer,
        train=train,
        evaluation=evaluation,
        collator=DataCollatorWithPadding(tokenizer),
        selection_metric="eval_accuracy",
        compute_metrics=toy_accuracy,
    )


def main(argv: Sequence[str] | None = None, make_optimizer: OptimizerMaker = build_optimizer) -> dict[str, Any]:
    """Run what the flags ask for, and return the results."""
    return run_from_scratch(ToyArguments, make_task, argv, __doc__, make_optimizer)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("mfac_hf").setLevel(logging.INFO)
    main()
