"""GLUE: predictions to metrics, and to the files that the benchmark server takes.

F1 is that of class 1, correlations are Matthews, Pearson and Spearman (Wang et al. 2018, arXiv:1804.07461).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

from mfac_hf.storage import write_text
from mfac_hf.tasks.glue import STSB_RANGE, GlueTask, get_task

__all__ = ["GlueMetric", "make_compute_metrics", "predictions_from_outputs", "write_predictions"]


class GlueMetric(evaluate.Metric):
    """The metrics of one GLUE task behind ``evaluate``'s interface, without a download.

    ``GlueMetric("mrpc").compute(predictions=[0, 1], references=[0, 1])`` gives ``{"f1": 1.0, "accuracy": 1.0}``.
    Predictions are class ids, or scores for STS-B. F1 is that of class 1. A correlation (Matthews, Pearson,
    Spearman) with a constant is undefined; it counts as 0, the convention for Matthews.

    Raises:
        ValueError: unknown task, or (in ``compute``) predictions that are not finite.
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
    """Extend a correlation to constants: it is 0 with one."""

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
        outputs: what Trainer collected: logits of shape (examples, num_labels), or a tuple that starts with them.
        task: the task.

    Returns:
        Shape (examples,), integer or floating point.

    Raises:
        ValueError: an output is NaN or infinite.
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

    After the header ``index``, ``prediction`` comes one line for each example in the split's order: class names for
    MNLI, QNLI and RTE, class ids for the others, scores clipped to 0..5 with three decimals for STS-B.

    Raises:
        ValueError: the server takes no predictions of that split.
    """
    if split not in task.server_files:
        raise ValueError(f"no prediction file for split {split!r} of {task.name}: expected {list(task.server_files)}")
    if task.is_regression:
        values = [f"{score:.3f}" for score in np.clip(predictions, *STSB_RANGE)]
    else:
        values = [task.label_names[i] if task.server_names else str(i) for i in predictions.tolist()]
    path = Path(output_dir) / task.server_files[split]
    lines = ["index\tprediction", *(f"{index}\t{value}" for index, value in enumerate(values))]
    write_text(path, "\n".join(lines) + "\n")
    return path
