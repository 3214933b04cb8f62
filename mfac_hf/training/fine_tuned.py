"""A fine-tuned model with its task: data to prune it on, and the metric that tells what is left of it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from mfac_hf.tasks import glue, squad
from mfac_hf.tasks.hub_names import GLUE, SQUAD
from mfac_hf.tasks.squad_answers import SquadEvaluation

__all__ = ["TASKS", "FineTuned", "load_fine_tuned"]

TASKS = (*glue.TASKS, *SQUAD)


@dataclass
class FineTuned:
    """What it takes to prune a model and to judge the result.

    Attributes:
        model: the model, on the trainer's device.
        tokenizer: its tokenizer.
        trainer: an unmodified Trainer that evaluates it; it trains nothing.
        metric: name of the task's metric in :meth:`evaluate`.
        evaluated_on: where the evaluation examples come from.
        scratch: the directory that Trainer insists on; it goes with this object.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    trainer: Trainer
    metric: str
    evaluated_on: str
    scratch: tempfile.TemporaryDirectory[str]

    def loader(self) -> DataLoader[Any]:
        """The training examples, for the gradients."""
        return self.trainer.get_train_dataloader()

    def evaluate(self) -> dict[str, float]:
        """Metrics of the model as it is now, ``eval_loss`` among them."""
        return self.trainer.evaluate()


def load_fine_tuned(
    model_name: str,
    task: str,
    dataset_name: str | None = None,
    *,
    max_seq_length: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    holdout_fraction: float | None = None,
    eval_batch_size: int = 64,
    use_cpu: bool = False,
    cache_dir: str | None = None,
) -> FineTuned:
    """Load a fine-tuned model and the data of its task.

    Args:
        model_name: name on the Hub, or a directory; its task head has to be trained.
        task: a GLUE task, ``"squad"`` or ``"squad_v2"``.
        dataset_name: name on the Hub, or a directory in the same layout; default the official data set.
        max_seq_length: tokens of an input; default 128 for GLUE and 384 for SQuAD, where windows share a third of it
            and questions take at most a sixth.
        max_train_samples: so many examples of the training split, drawn at random but always the same; None for all.
        max_eval_samples: so many of the evaluation examples, likewise.
        holdout_fraction: evaluate on this fraction of the training split, which then gives no gradients, and leave the
            validation split alone: for choosing options.
        eval_batch_size: examples of a forward pass in evaluations.
        use_cpu: also where there is a GPU.
        cache_dir: for downloads.

    Raises:
        ValueError: an unknown task, a model that is not fine-tuned for it, or a limit out of range.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
    for name, count in {"max_train_samples": max_train_samples, "max_eval_samples": max_eval_samples}.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1")
    is_squad = task in SQUAD
    kind = AutoModelForQuestionAnswering if is_squad else AutoModelForSequenceClassification
    model, loading = kind.from_pretrained(model_name, cache_dir=cache_dir, output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(
            f"{model_name} is not fine-tuned for {task}: it has no {', '.join(sorted(loading['missing_keys']))}. "
            "Fine-tune it first (scripts/run_glue.py, scripts/run_squad.py)"
        )
    tokenizer = AutoTokenizer.from_pretrained(model_name, cache_dir=cache_dir)
    limits = max_train_samples, max_eval_samples
    if is_squad:
        train, evaluation, metric, compute = _squad(
            task, dataset_name, tokenizer, max_seq_length or 384, limits, holdout_fraction, cache_dir
        )
    else:
        expected = glue.get_task(task).num_labels
        if model.config.num_labels != expected:
            raise ValueError(f"{model_name} has {model.config.num_labels} outputs; {task} needs {expected}")
        train, evaluation, metric, compute = _glue(
            task, dataset_name, tokenizer, max_seq_length or 128, limits, holdout_fraction, cache_dir
        )
    scratch = tempfile.TemporaryDirectory()
    arguments = TrainingArguments(
        output_dir=scratch.name,
        per_device_eval_batch_size=eval_batch_size,
        report_to="none",
        disable_tqdm=True,
        use_cpu=use_cpu,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        compute_metrics=compute,
    )
    where = "validation" if holdout_fraction is None else "held-out training examples"
    return FineTuned(model, tokenizer, trainer, f"eval_{metric}", where, scratch)


def _limit(examples: Dataset, count: int | None) -> Dataset:
    if count is None or count >= len(examples):
        return examples
    return examples.shuffle(seed=glue.HOLDOUT_SEED).select(range(count))


def _glue(
    name: str,
    dataset_name: str | None,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    limits: tuple[int | None, int | None],
    holdout_fraction: float | None,
    cache_dir: str | None,
) -> tuple[Dataset, Dataset, str, Any]:
    task = glue.get_task(name)
    data = glue.load_glue(dataset_name or GLUE, task, cache_dir=cache_dir)
    # of MNLI's two, the matched one
    wanted = ["train"] + ([] if holdout_fraction is not None else [task.validation_splits[0]])
    if missing := [split for split in wanted if split not in data]:
        raise ValueError(f"the data of {name} lack the split {missing[0]!r}; there are {', '.join(map(str, data))}")
    if holdout_fraction is not None:
        phrases = task.text_columns[0] if task.phrases else None
        train, evaluation = glue.hold_out(data["train"], holdout_fraction, phrases)
    else:
        train, evaluation = (data[split] for split in wanted)
    train, evaluation = (
        glue.tokenize(_limit(part, limit), task, tokenizer, max_seq_length)
        for part, limit in zip((train, evaluation), limits, strict=True)
    )
    return train, evaluation, task.selection_metric, glue.make_compute_metrics(task)


def _squad(
    name: str,
    dataset_name: str | None,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    limits: tuple[int | None, int | None],
    holdout_fraction: float | None,
    cache_dir: str | None,
) -> tuple[Dataset, Dataset, str, Any]:
    def load(split: str) -> Dataset:
        return squad.load_squad(
            dataset_name or SQUAD[name], split, version_2_with_negative=name == "squad_v2", cache_dir=cache_dir
        )

    if holdout_fraction is not None:
        train, evaluation = squad.hold_out_articles(load("train"), holdout_fraction)
    else:
        train, evaluation = load("train"), load("validation")
    evaluation = _limit(evaluation, limits[1])
    train_features, eval_features = (
        squad.squad_features(
            part,
            tokenizer,
            max_seq_length=max_seq_length,
            doc_stride=max_seq_length // 3,
            max_query_length=max_seq_length // 6,
        )
        for part in (_limit(train, limits[0]), evaluation)
    )
    scoring = SquadEvaluation(evaluation, eval_features, version_2_with_negative=name == "squad_v2")
    return train_features, eval_features, "f1", scoring
