"""A fine-tuned model with its task: data to prune it on, and the metric that judges the result."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from mfac_hf.hub_names import GLUE, SQUAD
from mfac_hf.tasks import glue, squad
from mfac_hf.tasks.glue_metric import make_compute_metrics
from mfac_hf.tasks.squad_answers import AnswerOptions, SquadEvaluation

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


@dataclass(frozen=True)
class _Selection:
    """Which data of a task to load; the fields are arguments of `load_fine_tuned`."""

    dataset_name: str | None
    max_seq_length: int | None
    max_train_samples: int | None
    max_eval_samples: int | None
    holdout_fraction: float | None
    cache_dir: str | None

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}; expected at least 1")

    def limit(self, train: Dataset, evaluation: Dataset) -> tuple[Dataset, Dataset]:
        """Draw as many of the examples as are wanted."""
        return _draw(train, self.max_train_samples), _draw(evaluation, self.max_eval_samples)


@dataclass(frozen=True)
class _TaskData:
    """Features to take gradients of, features to evaluate on, and the metric."""

    train: Dataset
    evaluation: Dataset
    metric: str
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]


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
        dataset_name: name on the Hub, or a directory in the same layout; default: the official data set.
        max_seq_length: tokens of an input; default: 128 for GLUE and 384 for SQuAD, where windows share a third of it
            and questions take at most a sixth.
        max_train_samples: number of training examples, drawn at random but always the same ones; None for all.
        max_eval_samples: number of evaluation examples, drawn likewise.
        holdout_fraction: for choosing options: fraction of the training split to evaluate on, in place of the
            validation split; it then gives no gradients.
        eval_batch_size: examples in a forward pass of an evaluation.
        use_cpu: whether to stay on the CPU where there is a GPU.
        cache_dir: directory for downloads.

    Raises:
        ValueError: an unknown task, a model that is not fine-tuned for it, or a limit out of range.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
    selection = _Selection(
        dataset_name, max_seq_length, max_train_samples, max_eval_samples, holdout_fraction, cache_dir
    )
    model = _load_model(model_name, task, cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_name, cache_dir=cache_dir)
    data = (_squad if task in SQUAD else _glue)(task, tokenizer, selection)
    scratch = tempfile.TemporaryDirectory()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=scratch.name,
            per_device_eval_batch_size=eval_batch_size,
            report_to="none",
            disable_tqdm=True,
            use_cpu=use_cpu,
        ),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        compute_metrics=data.compute_metrics,
    )
    where = "validation" if holdout_fraction is None else "held-out training examples"
    return FineTuned(model, tokenizer, trainer, f"eval_{data.metric}", where, scratch)


def _load_model(model_name: str, task: str, cache_dir: str | None) -> PreTrainedModel:
    """Load the model, and see that its head is trained and suits the task."""
    kind = AutoModelForQuestionAnswering if task in SQUAD else AutoModelForSequenceClassification
    model, loading = kind.from_pretrained(model_name, cache_dir=cache_dir, output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(
            f"{model_name} is not fine-tuned for {task}: it has no {', '.join(sorted(loading['missing_keys']))}. "
            "Fine-tune it first (scripts/run_glue.py, scripts/run_squad.py)"
        )
    if task in glue.TASKS and model.config.num_labels != (expected := glue.get_task(task).num_labels):
        raise ValueError(f"{model_name} has {model.config.num_labels} outputs; {task} needs {expected}")
    return model


def _draw(examples: Dataset, count: int | None) -> Dataset:
    """Draw this number of examples at random, but always the same ones; None for all."""
    if count is None or count >= len(examples):
        return examples
    return examples.shuffle(seed=glue.HOLDOUT_SEED).select(range(count))


def _glue(name: str, tokenizer: PreTrainedTokenizerBase, selection: _Selection) -> _TaskData:
    task = glue.get_task(name)
    data = glue.load_glue(selection.dataset_name or GLUE, task, cache_dir=selection.cache_dir)
    validation = task.validation_splits[0]  # of MNLI's two the matched one
    for split in ("train",) if selection.holdout_fraction is not None else ("train", validation):
        if split not in data:
            raise ValueError(f"the data of {name} lack the split {split!r}; there are {', '.join(map(str, data))}")
    if selection.holdout_fraction is not None:
        train, evaluation = glue.hold_out(data["train"], selection.holdout_fraction, task.phrase_column)
    else:
        train, evaluation = data["train"], data[validation]
    train, evaluation = (
        glue.tokenize(part, task, tokenizer, selection.max_seq_length or glue.MAX_SEQ_LENGTH)
        for part in selection.limit(train, evaluation)
    )
    return _TaskData(train, evaluation, task.selection_metric, make_compute_metrics(task))


def _squad(name: str, tokenizer: PreTrainedTokenizerBase, selection: _Selection) -> _TaskData:
    version_2 = name == "squad_v2"
    max_seq_length = selection.max_seq_length or squad.MAX_SEQ_LENGTH

    def load(split: str) -> Dataset:
        source = selection.dataset_name or SQUAD[name]
        return squad.load_squad(source, split, version_2_with_negative=version_2, cache_dir=selection.cache_dir)

    if selection.holdout_fraction is not None:
        train, evaluation = squad.hold_out_articles(load("train"), selection.holdout_fraction)
    else:
        train, evaluation = load("train"), load("validation")
    train, evaluation = selection.limit(train, evaluation)
    train_features, eval_features = (
        squad.squad_features(
            part,
            tokenizer,
            max_seq_length=max_seq_length,
            doc_stride=max_seq_length // 3,
            max_query_length=max_seq_length // 6,
        )
        for part in (train, evaluation)
    )
    scoring = SquadEvaluation(evaluation, eval_features, AnswerOptions(version_2_with_negative=version_2))
    return _TaskData(train_features, eval_features, "f1", scoring)
