"""Fine-tune on GLUE: ``python scripts/run_glue.py --model_name_or_path MODEL --task_name sst2 --do_train --do_eval``.

A BERT (or any sequence classifier) learns a GLUE task through an unmodified Trainer, with M-FAC or AdamW:

    python scripts/run_glue.py --model_name_or_path google/bert_uncased_L-2_H-128_A-2 --dataset_name nyu-mll/glue \
        --task_name sst2 --do_train --do_eval --optim_name mfac --num_grads 1024 --output_dir outputs/sst2-mfac
    python scripts/run_glue.py scripts/recipes/glue_mfac.yaml --task_name mrpc --learning_rate 3e-4

Model and data are Hub names or local directories, through the same flags. All flags of TrainingArguments work. A
recipe (YAML or JSON) holds flags; flags after it win. ``--holdout_fraction 0.1`` tunes on a fixed tenth of the
training split and leaves the validation split alone. ``--resume_from_checkpoint last`` continues a run that was cut
off.

Writes ``results.json`` (metrics, command line, arguments, versions, time, memory) into the output directory and, for
``--do_predict``, the test predictions as the GLUE server takes them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mfac_hf.callbacks import MFACLoggingCallback
from mfac_hf.hub.push import push_run
from mfac_hf.hub.run_records import write_results
from mfac_hf.tasks import glue
from mfac_hf.tasks.hub_names import GLUE
from mfac_hf.training.arguments import (
    ModelArguments,
    OptimizerArguments,
    build_optimizer,
    find_checkpoint,
    parse_args,
    require_action,
)
from mfac_hf.training.gradual_pruning import GradualArguments, build_pruning_callback, pruning_results
from mfac_hf.training.pruning_arguments import PruningArguments, one_shot


@dataclass
class GlueArguments:
    """Which task, and how much of it."""

    task_name: str = field(metadata={"help": f"GLUE task: {', '.join(glue.TASKS)}."})
    dataset_name: str = field(
        default=GLUE, metadata={"help": "Name on the Hub, or a local directory in the same layout."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are truncated to so many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N examples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first N examples only."})
    holdout_fraction: float | None = field(
        default=None,
        metadata={
            "help": "For tuning: train without this fraction of the training split and evaluate on it, in place of "
            "the validation split. Which examples these are depends on nothing but the data and the fraction."
        },
    )


def choose_splits(
    data: DatasetDict, task: glue.GlueTask, data_args: GlueArguments, training_args: TrainingArguments
) -> tuple[Dataset | None, dict[str, Dataset], dict[str, Dataset]]:
    """Pick the training split, the evaluation splits by name, and the test splits by name.

    Raises:
        ValueError: A split that the flags ask for is missing, or a limit or the hold-out fraction is out of range.
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
        phrases = task.text_columns[0] if task.phrases else None
        rest, held_out = glue.hold_out(split("train", "--holdout_fraction"), data_args.holdout_fraction, phrases)
        train = rest if training_args.do_train else None
        evaluation = {"held_out": held_out} if training_args.do_eval else {}
    elif training_args.do_eval:
        evaluation = {name: split(name, "--do_eval") for name in task.validation_splits}
    if training_args.do_predict:
        # hidden labels are no labels: Trainer would compute a loss with them
        test = {
            name: split(name, "--do_predict").select_columns(list(task.text_columns)) for name in task.server_files
        }
    if train is not None:
        train = limit(train, "--max_train_samples", data_args.max_train_samples)
    evaluation = {
        name: limit(part, "--max_eval_samples", data_args.max_eval_samples) for name, part in evaluation.items()
    }
    return train, evaluation, test


def load_model(
    model_args: ModelArguments, task: glue.GlueTask, max_seq_length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model, with a head for the task, and its tokenizer.

    Raises:
        ValueError: The model has fewer positions than ``max_seq_length``.
    """
    labels = dict(enumerate(task.label_names)) or {0: "score"}
    config = AutoConfig.from_pretrained(
        **model_args.model_source,
        num_labels=task.num_labels,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        problem_type="regression" if task.is_regression else "single_label_classification",
    )
    positions = getattr(config, "max_position_embeddings", max_seq_length)
    if not 0 < max_seq_length <= positions:
        raise ValueError(f"--max_seq_length {max_seq_length}: expected 1 to {positions}, the positions of the model")
    model = AutoModelForSequenceClassification.from_pretrained(**model_args.model_source, config=config)
    return model, AutoTokenizer.from_pretrained(**model_args.tokenizer_source)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the flags ask for.

    Args:
        argv: Arguments without the program's name; ``sys.argv[1:]`` if None.

    Returns:
        The metrics: Trainer's ``train_*`` and ``eval_*`` values, and the name and value of the metric that selects
        models.
    """
    started = time.perf_counter()
    kinds = (ModelArguments, GlueArguments, OptimizerArguments, PruningArguments, GradualArguments, TrainingArguments)
    arguments = parse_args(*kinds, argv=argv)
    model_args, data_args, optimizer_args, pruning_args, gradual_args, training_args = arguments
    require_action(training_args)
    prune_only = pruning_args.is_one_shot(training_args)
    trains = training_args.do_train and not prune_only
    pruning = build_pruning_callback(pruning_args, gradual_args, training_args)
    task = glue.get_task(data_args.task_name)
    checkpoint = find_checkpoint(training_args)
    data = glue.load_glue(data_args.dataset_name, task, cache_dir=model_args.cache_dir)
    train, evaluation, test = choose_splits(data, task, data_args, training_args)

    # before the model: its classification head is drawn at random
    set_seed(training_args.seed)
    model, tokenizer = load_model(model_args, task, data_args.max_seq_length)

    def features(examples: Dataset) -> Dataset:
        with training_args.main_process_first(desc="tokenizing"):
            return glue.tokenize(examples, task, tokenizer, data_args.max_seq_length)

    eval_features = {name.removeprefix("validation_"): features(part) for name, part in evaluation.items()}
    selection_metric = f"eval_{task.selection_metric}"
    if len(eval_features) > 1:
        selection_metric = f"eval_{next(iter(eval_features))}_{task.selection_metric}"
    if training_args.load_best_model_at_end and training_args.metric_for_best_model == "loss":
        # TrainingArguments puts "loss" where nothing was given; "eval_loss" still asks for it
        training_args.metric_for_best_model, training_args.greater_is_better = selection_metric, True

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=features(train) if train is not None else None,
        eval_dataset=eval_features if len(eval_features) > 1 else next(iter(eval_features.values()), None),
        processing_class=tokenizer,
        compute_metrics=glue.make_compute_metrics(task),
        optimizers=(build_optimizer(model, optimizer_args, training_args) if trains else None, None),
    )
    MFACLoggingCallback.attach(trainer)

    results: dict[str, Any] = {"task": task.name}
    if prune_only:
        results |= one_shot(trainer, pruning_args)
    if trains:
        if pruning is not None:
            pruning.attach(trainer)
        results |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        trainer.save_state()
        if pruning is not None:
            results |= pruning_results(pruning, training_args)
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
            predictions = glue.predictions_from_outputs(outputs, task)
            glue.write_predictions(training_args.output_dir, task, name, predictions)
    if trainer.is_world_process_zero():
        write_results(training_args.output_dir, results, arguments=arguments, argv=argv, started=started)
        push_run(trainer)
    return results


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("mfac_hf").setLevel(logging.INFO)
    main()
