"""GLUE's metrics, by hand and through Trainer's interface, and the prediction files."""

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from mfac_hf.tasks.glue import TASKS
from mfac_hf.tasks.glue_metric import GlueMetric, make_compute_metrics, write_predictions


@pytest.mark.parametrize(
    ("task", "predictions", "references", "expected"),
    [
        # 2 true positives, 1 true negative, 1 false positive, 1 false negative
        ("mrpc", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], {"f1": 2 / 3, "accuracy": 3 / 5}),
        ("cola", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], {"matthews_correlation": (2 - 1) / 6, "accuracy": 3 / 5}),
        ("mnli", [0, 1, 2, 2], [0, 1, 2, 1], {"accuracy": 0.75}),
        ("stsb", [1.0, 2.0, 3.0], [1.0, 2.0, 4.0], {"pearson": 3 / (28 / 3) ** 0.5, "spearmanr": 1.0}),
        # The value that scipy's documentation gives for these ranks with ties; Pearson by hand
        ("stsb", [1, 2, 3, 4, 5], [5, 6, 7, 8, 7], {"pearson": 6 / 52**0.5, "spearmanr": 0.8207826816681233}),
    ],
)
def test_metrics_by_hand(task, predictions, references, expected):
    """Values worked out by hand or published."""
    assert GlueMetric(task).compute(predictions=predictions, references=references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("task", "predictions", "references", "expected"),
    [
        ("cola", [1, 1, 1, 1], [1, 0, 1, 0], {"matthews_correlation": 0.0, "accuracy": 0.5}),
        ("cola", [1, 1], [1, 1], {"matthews_correlation": 0.0, "accuracy": 1.0}),
        ("mrpc", [0, 0, 0], [1, 0, 1], {"f1": 0.0, "accuracy": 1 / 3}),
        ("mrpc", [0, 0], [0, 0], {"f1": 0.0, "accuracy": 1.0}),
        ("stsb", [2.5, 2.5, 2.5], [1.0, 2.0, 3.0], {"pearson": 0.0, "spearmanr": 0.0}),
        ("stsb", [1.0, 2.0, 3.0], [4.0, 4.0, 4.0], {"pearson": 0.0, "spearmanr": 0.0}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_metrics_of_constants_are_defined(task, predictions, references, expected):
    """A constant answer scores 0 and warns of nothing, where the textbook formula divides by zero."""
    assert GlueMetric(task).compute(predictions=predictions, references=references) == pytest.approx(expected)


def test_metric_is_an_evaluate_metric_and_takes_batches():
    """``add`` and ``add_batch`` work as for any metric of ``evaluate``."""
    metric = GlueMetric("mrpc")
    assert isinstance(metric, evaluate.Metric)
    metric.add_batch(predictions=[1, 1, 1], references=[1, 1, 0])
    metric.add(prediction=0, reference=1)
    metric.add(prediction=0, reference=0)
    assert metric.compute() == pytest.approx({"f1": 2 / 3, "accuracy": 3 / 5})


def test_stsb_scores_keep_double_precision():
    """Scores that differ in the eleventh digit still correlate."""
    references = np.linspace(0, 5, 50)
    predictions = 1e6 + 1e-4 * references
    scores = GlueMetric("stsb").compute(predictions=predictions, references=references)
    assert scores["pearson"] == pytest.approx(1.0, abs=1e-6)


def test_compute_metrics_takes_logits_tuples_and_scores():
    """Trainer hands over logits, a tuple that starts with them, or scores in a column."""
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, -1.0]])
    labels = np.array([0, 1, 1])
    compute = make_compute_metrics(TASKS["sst2"])
    assert compute(EvalPrediction(logits, labels)) == pytest.approx({"accuracy": 2 / 3})
    assert compute(EvalPrediction((logits, np.zeros(3)), labels)) == pytest.approx({"accuracy": 2 / 3})
    scores = np.array([[1.0], [2.0], [3.0]], dtype=np.float32)
    compute = make_compute_metrics(TASKS["stsb"])
    assert compute(EvalPrediction(scores, np.array([2.0, 4.0, 6.0])))["pearson"] == pytest.approx(1.0)


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_outputs_that_are_not_finite_are_an_error(task):
    """Taking the argmax would turn NaN into class 0 in silence."""
    outputs = np.full((4, TASKS[task].num_labels), 0.5)
    outputs[2, 0] = np.nan
    with pytest.raises(ValueError, match=rf"1 of {outputs.size} model outputs are not finite: training diverged"):
        make_compute_metrics(TASKS[task])(EvalPrediction(outputs, np.zeros(4)))


@pytest.mark.parametrize(
    ("task", "split", "predictions", "name", "body"),
    [
        ("sst2", "test", [1, 0], "SST-2.tsv", "0\t1\n1\t0\n"),
        ("rte", "test", [1, 0], "RTE.tsv", "0\tnot_entailment\n1\tentailment\n"),
        ("wnli", "test", [1, 0], "WNLI.tsv", "0\t1\n1\t0\n"),
        ("mnli", "test_mismatched", [2, 1], "MNLI-mm.tsv", "0\tcontradiction\n1\tneutral\n"),
        ("stsb", "test", [-0.25, 1.23456, 7.0], "STS-B.tsv", "0\t0.000\n1\t1.235\n2\t5.000\n"),
    ],
)
def test_prediction_files_have_the_form_that_the_server_takes(task, split, predictions, name, body, tmp_path):
    """Header, numbering, class names or ids, clipped scores."""
    path = write_predictions(tmp_path, TASKS[task], split, np.array(predictions))
    assert path.name == name and path.read_text() == "index\tprediction\n" + body


def test_prediction_file_of_another_split_is_refused(tmp_path):
    """MNLI has no plain test split; nothing is written."""
    with pytest.raises(ValueError, match="no prediction file for split 'test' of mnli"):
        write_predictions(tmp_path, TASKS["mnli"], "test", np.array([0]))
    assert not list(tmp_path.iterdir())
