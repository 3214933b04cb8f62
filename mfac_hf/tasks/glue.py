"""The nine GLUE tasks: data, features, metrics and the benchmark server's prediction files.

Source: Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", 2018,
arXiv:1804.07461. Column names, label names and label order are those of ``nyu-mll/glue`` on the Hub.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction, PreTrainedTokenizerBase

STSB_RANGE = (0.0, 5.0)
# fixed, and apart from the training seed: every run of a sweep is judged on the same held-out examples
HOLDOUT_SEED = 20180420
# from here on nearly all of SST-2's training phrases are whole sentences or most of one
SENTENCE_WORDS = 15


@dataclass(frozen=True)
class GlueTask:
    """One task: what to read, what to predict, and how that is judged.

    Attributes:
        name: Name of the configuration on the Hub.
        text_columns: One column for single sentences, two for pairs.
        label_names: Class names in the order of their ids; empty for regression.
        metrics: Names of the metrics; the first selects models.
        server_files: Test split -> file name that the GLUE server expects.
        server_names: Whether the server expects class names instead of ids.
        validation_splits: Suffix of the metric's name -> split; one unnamed split except for MNLI.
        phrases: Whether training texts are phrases of one another, as those of SST-2 are.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    server_files: Mapping[str, str]
    server_names: bool = False
    validation_splits: tuple[str, ...] = ("validation",)
    phrases: bool = False

    @property
    def num_labels(self) -> int:
        """Outputs of the model: one for regression, else one per class."""
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
        GlueTask("sst2", _SINGLE, ("negative", "positive"), ("accuracy",), {"test": "SST-2.tsv"}, phrases=True),
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
        # the two classes stand the other way round than in RTE and QNLI
        GlueTask("wnli", _PAIR, ("not_entailment", "entailment"), ("accuracy",), {"test": "WNLI.tsv"}),
    )
}


def get_task(name: str) -> GlueTask:
    """Return the task of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in TASKS:
        raise ValueError(f"unknown GLUE task {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def load_glue(
    dataset_name: str | os.PathLike[str], task: str | GlueTask, *, cache_dir: str | None = None
) -> DatasetDict:
    """Load the splits of one task and check their columns and labels.

    Args:
        dataset_name: Name on the Hub (``nyu-mll/glue``), or a local directory laid out like that repository.
        task: The task, or its name.
        cache_dir: Where ``datasets`` keeps its Arrow files.

    Returns:
        The splits that the source has. Test splits keep -1 where the label is hidden.

    Raises:
        ValueError: The source has no such task, a column is missing, class names stand in another order, or a
            label is out of range.
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
    # written so that NaN counts as wrong
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


def hold_out(train: Dataset, fraction: float, phrases: str | None = None) -> tuple[Dataset, Dataset]:
    """Split the training examples into those to train on and those to tune on.

    The cut depends on the data and the fraction alone, not on the training seed, so all runs of a sweep are judged
    on the same examples and the validation split stays untouched.

    The training split of SST-2 holds sentences and most of their phrases, its validation split only whole sentences.
    Held out at random, phrases of training sentences would be judged: a model that remembers looked 8 points better
    there than on the validation split. So with ``phrases``, long examples are held out, and those that share text with
    them leave the training part.

    Args:
        train: The training split.
        fraction: Part to hold out, between 0 and 1.
        phrases: Column of texts that may contain one another, if they may.

    Returns:
        The examples to train on and the held-out ones, disjoint. Without ``phrases`` they are ``train`` together.

    Raises:
        ValueError: ``fraction`` is not inside (0, 1), or leaves one of the parts empty.
    """
    held_out = round(len(train) * fraction) if 0 < fraction < 1 else 0
    if phrases is None and 0 < held_out < len(train):
        parts = train.train_test_split(test_size=held_out, seed=HOLDOUT_SEED)
        return parts["train"], parts["test"]
    kept: list[int] = []
    chosen: list[int] = []
    if phrases is not None and held_out:
        texts = [text.strip() for text in train[phrases]]
        long = [i for i, text in enumerate(texts) if len(text.split()) >= SENTENCE_WORDS]
        chosen = np.random.default_rng(HOLDOUT_SEED).permutation(long)[:held_out].tolist()
        sentences = [texts[i] for i in chosen]
        joined = "\n".join(sentences)
        overlaps = {i for i in long if any(sentence in texts[i] for sentence in sentences)}
        kept = [i for i, text in enumerate(texts) if i not in overlaps and text not in joined]
    if not kept or not chosen:
        of = "" if phrases is None else f" (whole sentences, of at least {SENTENCE_WORDS} words, are held out here)"
        raise ValueError(
            f"holdout_fraction {fraction} of {len(train)} training examples leaves a part empty; "
            f"expected a fraction between 0 and 1 that leaves at least one example on each side{of}"
        )
    return train.select(kept), train.select(chosen)


def tokenize(
    examples: Dataset, task: GlueTask, tokenizer: PreTrainedTokenizerBase, max_seq_length: int = 128
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


class GlueMetric(evaluate.Metric):
    """The metrics of one GLUE task behind ``evaluate``'s interface, without a download.

    ``GlueMetric("mrpc").compute(predictions=[0, 1], references=[0, 1])`` gives ``{"f1": 1.0, "accuracy": 1.0}``.
    Predictions are class ids, or scores for STS-B. F1 is that of class 1. A correlation (Matthews, Pearson,
    Spearman) with a constant is undefined; it counts as 0, the convention for Matthews.

    Raises:
        ValueError: Unknown task, or (in ``compute``) predictions that are not finite.
    """

    def __init__(self, task: str, **kwargs: Any) -> None:
        """Make the metric of a task; ``kwargs`` go to ``evaluate.Metric``."""
        self.task = get_task(task)
        super().__init__(config_name=task, keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("float64" if self.task.is_regression else "int64")
        return evaluate.MetricInfo(
            description=f"GLUE {self.task.name}: {', '.join(self.task.metrics)}.",
            citation="Wang et al. 2018, arXiv:1804.07461",
            inputs_description="Predicted and true class ids, or scores for stsb.",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        predicted, true = np.asarray(predictions), np.asarray(references)
        _require_finite(predicted)
        return {name: float(_METRICS[name](true, predicted)) for name in self.task.metrics}


def _correlation(statistic: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    """Extend a correlation to constants, with which it is 0."""

    def value(true: np.ndarray, predicted: np.ndarray) -> float:
        return 0.0 if np.ptp(true) == 0 or np.ptp(predicted) == 0 else statistic(true, predicted)

    return value


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": lambda true, predicted: f1_score(true, predicted, zero_division=0.0),
    "matthews_correlation": _correlation(matthews_corrcoef),
    "pearson": _correlation(lambda true, predicted: pearsonr(true, predicted).statistic),
    "spearmanr": _correlation(lambda true, predicted: spearmanr(true, predicted).statistic),
}


def _require_finite(outputs: np.ndarray) -> None:
    if not np.isfinite(outputs).all():
        raise ValueError(
            f"{int((~np.isfinite(outputs)).sum())} of {outputs.size} model outputs are not finite: training diverged; "
            "try a lower learning rate or more damping"
        )


def predictions_from_outputs(outputs: Any, task: GlueTask) -> np.ndarray:
    """Class ids (argmax of the logits), or scores for regression.

    Args:
        outputs: What Trainer collected: logits of shape (examples, num_labels), or a tuple that starts with them.
        task: The task.

    Returns:
        Shape (examples,), integer or floating point.

    Raises:
        ValueError: An output is NaN or infinite.
    """
    logits = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
    _require_finite(logits)
    return logits.reshape(-1) if task.is_regression else logits.argmax(axis=-1)


def make_compute_metrics(task: GlueTask) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the task's ``compute_metrics`` for Trainer."""
    metric = GlueMetric(task.name)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predicted = predictions_from_outputs(prediction.predictions, task)
        scores = metric.compute(predictions=predicted, references=prediction.label_ids)
        assert scores is not None  # only a secondary process of a distributed metric gets None
        return scores

    return compute_metrics


def write_predictions(output_dir: str | os.PathLike[str], task: GlueTask, split: str, predictions: np.ndarray) -> Path:
    """Write predictions of a test split as the tab-separated file that the GLUE server takes.

    A header ``index``, ``prediction`` and one line per example in the split's order: class names for MNLI, QNLI and
    RTE, class ids for the others, scores clipped to 0..5 with three decimals for STS-B.

    Raises:
        ValueError: The server takes no predictions of that split.
    """
    if split not in task.server_files:
        raise ValueError(f"no prediction file for split {split!r} of {task.name}: expected {list(task.server_files)}")
    if task.is_regression:
        values = [f"{score:.3f}" for score in np.clip(predictions, *STSB_RANGE)]
    else:
        values = [task.label_names[i] if task.server_names else str(i) for i in predictions.tolist()]
    path = Path(output_dir) / task.server_files[split]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["index\tprediction", *(f"{index}\t{value}" for index, value in enumerate(values))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
