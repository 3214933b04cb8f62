"""Fine-tune on GLUE: ``python scripts/run_glue.py --model_name_or_path MODEL --task_name sst2 --do_train --do_eval``.

A BERT (or any sequence classifier) learns a GLUE task through an unmodified Trainer, with M-FAC or AdamW:

    python scripts/run_glue.py --model_name_or_path google/bert_uncased_L-2_H-128_A-2 --dataset_name nyu-mll/glue \
        --task_name sst2 --do_train --do_eval --optim_name mfac --num_grads 1024 --output_dir outputs/sst2-mfac
    python scripts/run_glue.py scripts/recipes/glue_mfac.yaml --task_name mrpc --learning_rate 3e-4

The same flags take models and data from the Hub or from local directories. All flags of TrainingArguments work. A
recipe (YAML or JSON) holds flags; flags after it win. ``--holdout_fraction 0.1`` tunes on a fixed tenth of the
training split and leaves the validation split alone. ``--resume_from_checkpoint last`` continues a run that was cut
off.

``--lora_rank 8`` trains low-rank factors and a head beside frozen weights (LoRA, with peft) and saves them alone; the
output directory is then a model to evaluate like any other.

Writes ``results.json`` (metrics, command line, arguments, versions, time, memory) into the output directory and, for
``--do_predict``, the test predictions as the GLUE server takes them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from mfac_hf.hub_names import GLUE
from mfac_hf.tasks import glue, glue_metric
from mfac_hf.training.arguments import OptimizerMaker, build_optimizer, flag
from mfac_hf.training.trainer_run import TrainerRun


@dataclass
class GlueArguments:
    """Which task, and how much of its data."""

    task_name: str = field(metadata={"help": f"GLUE task: {', '.join(glue.TASKS)}."})
    dataset_name: str = flag(GLUE, "Name on the Hub, or a local directory in the same layout.")
    max_seq_length: int = flag(glue.MAX_SEQ_LENGTH, "Tokens of the longest input; longer ones are truncated.")
    max_train_samples: int | None = flag(None, "Train on the first N examples only.")
    max_eval_samples: int | None = flag(None, "Evaluate on the first N examples only.")
    holdout_fraction: float | None = flag(
        None,
        "For tuning: hold out this fraction of the training split and evaluate on it, in place of the validation "
        "split. The data and the fraction alone decide which examples these are.",
    )


def choose_splits(
    data: DatasetDict, task: glue.GlueTask, data_args: GlueArguments, training_args: TrainingArguments
) -> tuple[Dataset | None, dict[str, Dataset], dict[str, Dataset]]:
    """Pick the training split, the evaluation splits by name, and the test splits by name.

    Raises:
        ValueError: a split that the flags need is missing, or a limit or the hold-out fraction is out of range.
    """

    def split(name: str, flag: str) -> Dataset:
        if name not in data:
            raise ValueError(
                f"{flag} needs the split {name!r} of {task.name}; {data_args.dataset_name} has {list(data)}"
            )
        return data[name]

    def limit(examples: Dataset, flag: str, count: int | None) -> Dataset:
        if count is not None and count < 1:
            raise ValueError(f"{flag} {count}: expected at least 1")
        return examples if count is None else examples.select(range(min(count, len(examples))))

    train = split("train", "--do_train") if training_args.do_train else None
    evaluation: dict[str, Dataset] = {}
    test: dict[str, Dataset] = {}
    if data_args.holdout_fraction is not None:
        examples = split("train", "--holdout_fraction")
        rest, held_out = glue.hold_out(examples, data_args.holdout_fraction, task.phrase_column)
        train = rest if training_args.do_train else None
        evaluation = {"held_out": held_out} if training_args.do_eval else {}
    elif training_args.do_eval:
        evaluation = {name: split(name, "--do_eval") for name in task.validation_splits}
    if training_args.do_predict:
        # Hidden labels are no labels: Trainer would compute a loss with them.
        test = {
            name: split(name, "--do_predict").select_columns(list(task.text_columns)) for name in task.server_files
        }
    if train is not None:
        train = limit(train, "--max_train_samples", data_args.max_train_samples)
    evaluation = {
        name: limit(part, "--max_eval_samples", data_args.max_eval_samples) for name, part in evaluation.items()
    }
    return train, evaluation, test


def main(argv: Sequence[str] | None = None, make_optimizer: OptimizerMaker = build_optimizer) -> dict[str, Any]:
    """Run what the flags ask for.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.
        make_optimizer: makes the optimizer of the model and the flags.

    Returns:
        The metrics: Trainer's ``train_*`` and ``eval_*`` values, and the name and value of the metric that selects
        models.
    """
    run = TrainerRun(GlueArguments, argv, __doc__, make_optimizer)
    data_args, training_args = run.data_args, run.training_args
    task = glue.get_task(data_args.task_name)
    data = glue.load_glue(data_args.dataset_name, task, cache_dir=run.model_args.cache_dir)
    train, evaluation, test = choose_splits(data, task, data_args, training_args)
    labels = dict(enumerate(task.label_names)) or {0: "score"}
    model, tokenizer = run.load_model(
        AutoModelForSequenceClassification,
        data_args.max_seq_length,
        num_labels=task.num_labels,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        problem_type="regression" if task.is_regression else "single_label_classification",
    )

    def features(examples: Dataset) -> Dataset:
        with training_args.main_process_first(desc="tokenizing"):
            return glue.tokenize(examples, task, tokenizer, data_args.max_seq_length)

    eval_features = {name.removeprefix("validation_"): features(part) for name, part in evaluation.items()}
    selection_metric = f"eval_{task.selection_metric}"
    if len(eval_features) > 1:
        selection_metric = f"eval_{next(iter(eval_features))}_{task.selection_metric}"
    run.select_best_by(selection_metric)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=features(train) if train is not None else None,
        eval_dataset=eval_features if len(eval_features) > 1 else next(iter(eval_features.values()), None),
        processing_class=tokenizer,
        compute_metrics=glue_metric.make_compute_metrics(task),
        optimizers=(run.build_optimizer(model), None),
    )
    results = {"task": task.name, **run.train(trainer)}
    if training_args.do_eval:
        results |= trainer.evaluate()
        results |= {
            "evaluated_on": list(evaluation),
            "selection_metric": selection_metric,
            "selection_value": results[selection_metric],
        }
    for name, examples in test.items():
        outputs = trainer.predict(features(examples), metric_key_prefix="predict").predictions
        if trainer.is_world_process_zero():
            predictions = glue_metric.predictions_from_outputs(outputs, task)
            glue_metric.write_predictions(training_args.output_dir, task, name, predictions)
    run.finish(trainer, results)
    return results


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("mfac_hf").setLevel(logging.INFO)
    main()
