"""The nine GLUE tasks: data to features.

Source: Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", 2018,
arXiv:1804.07461. Column names, label names and label order are those of ``nyu-mll/glue`` on the Hub.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

__all__ = ["TASKS", "GlueTask", "get_task", "hold_out", "load_glue", "tokenize"]

MAX_SEQ_LENGTH = 128
STSB_RANGE = (0.0, 5.0)
# Fixed, and apart from the training seed: every run of a sweep is judged on the same held-out examples.
HOLDOUT_SEED = 20180420
# From here on nearly all of SST-2's training phrases are whole sentences or most of one.
SENTENCE_WORDS = 15


@dataclass(frozen=True)
class GlueTask:
    """A task: the texts to read, the labels to predict, and the metrics that judge the predictions.

    Attributes:
        name: name of the configuration on the Hub.
        text_columns: one column for single sentences, two for pairs.
        label_names: class names in the order of their ids; empty for regression.
        metrics: names of the metrics; the first selects models.
        server_files: by test split, the file name that the GLUE server expects.
        server_names: whether the server expects class names instead of ids.
        validation_splits: one, except for MNLI.
        phrase_column: column whose training texts are phrases of one another, as those of SST-2 are.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    server_files: Mapping[str, str]
    server_names: bool = False
    validation_splits: tuple[str, ...] = ("validation",)
    phrase_column: str | None = None

    @property
    def num_labels(self) -> int:
        """Outputs of the model: one for regression, else one for each class."""
        return len(self.label_names) or 1

    @property
    def is_regression(self) -> bool:
        """Whether the label is a real number."""
        return not self.label_names

    @property
    def selection_metric(self) -> str:
        """The metric that decides which model is better (the larger the better)."""
        return self.metrics[0]


_SINGLE = ("sentence",)
_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_MATTHEWS = ("matthews_correlation", "accuracy")
_F1 = ("f1", "accuracy")

TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask("cola", _SINGLE, ("unacceptable", "acceptable"), _MATTHEWS, {"test": "CoLA.tsv"}),
        GlueTask(
            "sst2",
            _SINGLE,
            ("negative", "positive"),
            ("accuracy",),
            {"test": "SST-2.tsv"},
            phrase_column="sentence",
        ),
        GlueTask("mrpc", _PAIR, ("not_equivalent", "equivalent"), _F1, {"test": "MRPC.tsv"}),
        GlueTask("stsb", _PAIR, (), ("pearson", "spearmanr"), {"test": "STS-B.tsv"}),
        GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), _F1, {"test": "QQP.tsv"}),
        GlueTask(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
            server_names=True,
            validation_splits=("validation_matched", "validation_mismatched"),
        ),
        GlueTask(
            "qnli", ("question", "sentence"), _ENTAILMENT, ("accuracy",), {"test": "QNLI.tsv"}, server_names=True
        ),
        GlueTask("rte", _PAIR, _ENTAILMENT, ("accuracy",), {"test": "RTE.tsv"}, server_names=True),
        # The two classes stand the other way round than in RTE and QNLI.
        GlueTask("wnli", _PAIR, ("not_entailment", "entailment"), ("accuracy",), {"test": "WNLI.tsv"}),
    )
}


def get_task(name: str) -> GlueTask:
    """Return the task of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"unknown GLUE task {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def load_glue(
    dataset_name: str | os.PathLike[str], task: str | GlueTask, *, cache_dir: str | None = None
) -> DatasetDict:
    """Load the splits of one task and check their columns and labels.

    Args:
        dataset_name: name on the Hub (``nyu-mll/glue``), or a local directory laid out like that repository.
        task: the task, or its name.
        cache_dir: where ``datasets`` keeps its Arrow files.

    Returns:
        The splits that the source has. Test splits keep -1 where the label is hidden.

    Raises:
        ValueError: the source has no such task, a column is missing, class names stand in another order, or a label
            is out of range.
    """
    task = get_task(task) if isinstance(task, str) else task
    name = os.fspath(dataset_name)
    try:
        data = datasets.load_dataset(name, task.name, cache_dir=cache_dir)
    except ValueError as error:
        raise ValueError(
            f"cannot load GLUE task {task.name!r} from {name!r} ({error}); expected a data set on the Hub "
            "with that configuration, or a local directory in the same layout whose README.md lists it"
        ) from error
    for split, examples in data.items():
        _check_split(task, str(split), examples)
    return data


def _check_split(task: GlueTask, split: str, examples: Dataset) -> None:
    """Raise ValueError unless the split has the task's columns and labels in range."""
    is_test = split.startswith("test")
    needed = task.text_columns if is_test else (*task.text_columns, "label")
    where = f"GLUE task {task.name!r}, split {split!r}"
    if missing := [column for column in needed if column not in examples.column_names]:
        raise ValueError(
            f"{where}: no column {', '.join(map(repr, missing))} among {examples.column_names}; "
            f"expected {', '.join(needed)}"
        )
    if "label" not in examples.column_names or len(examples) == 0:
        return
    feature = examples.features["label"]
    if isinstance(feature, ClassLabel) and not task.is_regression and tuple(feature.names) != task.label_names:
        raise ValueError(f"{where}: classes are {feature.names}; expected {list(task.label_names)} in this order")
    labels = np.asarray(examples.with_format("numpy")["label"][:])
    if labels.dtype.kind not in ("fiu" if task.is_regression else "iu"):
        expected = "numbers" if task.is_regression else f"integers from 0 to {task.num_labels - 1}"
        raise ValueError(f"{where}: labels such as {labels[0]!r} ({labels.dtype}); expected {expected}")
    low, high = STSB_RANGE if task.is_regression else (0, task.num_labels - 1)
    # Written so that NaN counts as wrong.
    wrong = ~((labels >= low) & (labels <= high))
    if is_test:
        wrong &= labels != -1
    if wrong.any():
        row = int(wrong.argmax())
        hidden = "; -1 marks the hidden labels of a test split only" if labels[row] == -1 else ""
        raise ValueError(
            f"{where}: label {labels[row]} in row {row} ({int(wrong.sum())} such rows) is out of range; "
            f"expected {low} to {high}{hidden}"
        )


def hold_out(train: Dataset, fraction: float, phrase_column: str | None = None) -> tuple[Dataset, Dataset]:
    """Split the training examples into those to train on and those to tune on.

    The cut depends on the data and the fraction alone, not on the training seed, so all runs of a sweep are judged
    on the same examples and the validation split stays untouched.

    The training split of SST-2 holds sentences and most of their phrases, its validation split only whole sentences.
    Held out at random, phrases of training sentences would be judged: a model that remembers looked 8 points better
    there than on the validation split. So with ``phrase_column``, long examples are held out, and those that share
    text with them leave the training part.

    Args:
        train: the training split.
        fraction: part to hold out, between 0 and 1.
        phrase_column: column of texts that may contain one another; None if they may not.

    Returns:
        The examples to train on and the held-out ones, disjoint. Without ``phrase_column`` they are ``train``
        together.

    Raises:
        ValueError: ``fraction`` is not inside (0, 1), or leaves one of the parts empty.
    """
    held_out = round(len(train) * fraction) if 0 < fraction < 1 else 0
    if phrase_column is None and 0 < held_out < len(train):
        parts = train.train_test_split(test_size=held_out, seed=HOLDOUT_SEED)
        return parts["train"], parts["test"]
    kept: list[int] = []
    chosen: list[int] = []
    if phrase_column is not None and held_out:
        texts = [text.strip() for text in train[phrase_column]]
        long = [i for i, text in enumerate(texts) if len(text.split()) >= SENTENCE_WORDS]
        chosen = np.random.default_rng(HOLDOUT_SEED).permutation(long)[:held_out].tolist()
        sentences = [texts[i] for i in chosen]
        joined = "\n".join(sentences)
        overlaps = {i for i in long if any(sentence in texts[i] for sentence in sentences)}
        kept = [i for i, text in enumerate(texts) if i not in overlaps and text not in joined]
    if not kept or not chosen:
        of = (
            ""
            if phrase_column is None
            else f" (whole sentences, of at least {SENTENCE_WORDS} words, are held out here)"
        )
        raise ValueError(
            f"holdout_fraction {fraction} of {len(train)} training examples leaves a part empty; "
            f"expected a fraction between 0 and 1 that leaves at least one example on each side{of}"
        )
    return train.select(kept), train.select(chosen)


def tokenize(
    examples: Dataset, task: GlueTask, tokenizer: PreTrainedTokenizerBase, max_seq_length: int = MAX_SEQ_LENGTH
) -> Dataset:
    """Turn texts into token ids, truncated to ``max_seq_length`` and not padded; the label stays.

    ``DataCollatorWithPadding`` then pads each batch to its own longest example.
    """

    def encode(batch: Mapping[str, Sequence[str]]) -> Any:
        return tokenizer(
            *(list(batch[column]) for column in task.text_columns), truncation=True, max_length=max_seq_length
        )

    unused = [column for column in examples.column_names if column != "label"]
    return examples.map(encode, batched=True, remove_columns=unused, desc=f"tokenizing {task.name}")
