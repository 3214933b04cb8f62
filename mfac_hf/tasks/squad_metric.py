"""SQuAD's exact match and F1 as an `evaluate.Metric` that needs no network, and the search for a null threshold.

Scores follow the two official evaluation scripts (Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822).
The scripts differ for an answer of which normalisation leaves nothing, such as the lone full stop that answers one
validation question of v1.1: version 1 gives every prediction F1 0 there, version 2 accepts an empty one. Here
version 2's rule holds for both.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

_DESCRIPTION = "Exact match and token F1 of extracted answers, in percent, as SQuAD v1.1 and v2.0 define them."
_CITATION = "Rajpurkar et al. 2016, arXiv:1606.05250; Rajpurkar et al. 2018, arXiv:1806.03822"
_INPUTS = """
Args:
    predictions: dicts with `id` and `prediction_text`; an empty text says that there is no answer.
    references: dicts with `id` and `answers`, whose `text` lists the accepted answers; none: not answerable.
Returns:
    `exact_match`, `f1` and `total`. If some reference is not answerable, also `HasAns_*` and `NoAns_*`: the same
    over the answerable and the unanswerable questions.
"""


def normalize_answer(text: str) -> str:
    """Lower the case, then drop ASCII punctuation, the articles a, an, the, and surplus white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def score_answer(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    r"""Score one prediction against the accepted answers, taking the best for each measure.

    With P and R the multisets of words of the normalised prediction and answer,

    .. math:: F_1 = 2\,|P \cap R| \,/\, (|P| + |R|),

    and 1 where both are empty. Answers that normalise to nothing are left out; if that leaves none, the empty
    string is the answer.

    Returns:
        Exact match (0 or 1) and F1 (0 to 1).
    """
    predicted = normalize_answer(prediction)
    accepted = [answer for answer in map(normalize_answer, answers) if answer] or [""]
    return float(predicted in accepted), max(_f1(predicted.split(), answer.split()) for answer in accepted)


def _f1(predicted: list[str], answer: list[str]) -> float:
    if not predicted or not answer:
        return float(predicted == answer)
    return 2 * (Counter(predicted) & Counter(answer)).total() / (len(predicted) + len(answer))


class SquadMetric(evaluate.Metric):
    """Exact match and F1 in percent, as ``compute(predictions=..., references=...)``.

    Every reference needs exactly one prediction of the same id; order does not matter. Keys as in the official
    scripts, `exact_match` for all versions: see `inputs_description`.
    """

    def __init__(self, **kwargs: Any) -> None:
        """Make the metric; ``kwargs`` go to ``evaluate.Metric``."""
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        answers = {"text": [text], "answer_start": [datasets.Value("int32")]}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": {"id": text, "prediction_text": text},
                    "references": {"id": text, "answers": answers},
                }
            ),
        )

    def _compute(
        self, predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        texts = {row["id"]: row["prediction_text"] for row in predictions}
        gold = {row["id"]: list(row["answers"]["text"]) for row in references}
        _require_unique("predictions", texts, predictions)
        _require_unique("references", gold, references)
        _require_same_ids(texts, gold)
        scores = 100 * np.array([score_answer(texts[name], answers) for name, answers in gold.items()])
        answerable = np.array([bool(answers) for answers in gold.values()])
        result = _mean("", scores)
        if not answerable.all():
            if answerable.any():
                result |= _mean("HasAns_", scores[answerable])
            result |= _mean("NoAns_", scores[~answerable])
        return result


def best_null_threshold(
    spans: Mapping[str, str], null_score_diffs: Mapping[str, float], references: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Find the null thresholds under which the given data would score best.

    A question counts as not answerable if its score difference (null minus best span) exceeds the threshold. The
    result is an upper bound that has seen the answers: choose on held-out training data, and report it apart.

    Args:
        spans: by id, the best non-empty answer.
        null_score_diffs: by id, the score of no answer minus that of the best answer.
        references: dicts with `id` and `answers`, as for `SquadMetric`.

    Returns:
        `best_exact_match`, `best_f1` (percent), and for each its `..._threshold`, the least that reaches it.

    Raises:
        ValueError: the ids differ, there are no references, or a difference is not a number.
    """
    gold = {row["id"]: list(row["answers"]["text"]) for row in references}
    _require_unique("references", gold, references)
    _require_same_ids(spans, gold)
    _require_same_ids(null_score_diffs, gold)
    if not gold:
        raise ValueError("no references: a threshold needs at least one question")
    diffs = np.array([null_score_diffs[name] for name in gold])
    if np.isnan(diffs).any():
        worst = next(name for name in gold if np.isnan(null_score_diffs[name]))
        raise ValueError(f"the score difference of question {worst} is NaN: the model's logits are not finite")
    answered = np.array([score_answer(spans[name], answers) for name, answers in gold.items()])
    silent = np.array([score_answer("", answers) for answers in gold.values()])

    order = np.argsort(diffs, kind="stable")
    diffs = diffs[order]
    # Row k: the scores when the k questions of least difference are answered.
    totals = silent.sum(0) + np.vstack([np.zeros(2), np.cumsum((answered - silent)[order], axis=0)])
    thresholds = np.concatenate([[np.nextafter(diffs[0], -np.inf)], diffs])
    # Questions of equal difference are answered all or not at all.
    reachable = np.concatenate([[True], diffs[1:] > diffs[:-1], [True]])
    totals, thresholds = totals[reachable], thresholds[reachable]

    result = {}
    for column, name in enumerate(("best_exact_match", "best_f1")):
        best = int(totals[:, column].argmax())
        result[name] = float(100 * totals[best, column] / len(gold))
        result[f"{name}_threshold"] = float(thresholds[best])
    return result


def _mean(prefix: str, scores: np.ndarray) -> dict[str, float]:
    exact, f1 = scores.mean(0)
    return {f"{prefix}exact_match": float(exact), f"{prefix}f1": float(f1), f"{prefix}total": len(scores)}


def _require_unique(what: str, by_id: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    if len(by_id) != len(rows):
        twice, count = Counter(row["id"] for row in rows).most_common(1)[0]
        raise ValueError(f"{what} have {count} rows of id {twice!r}; expected one for each question")


def _require_same_ids(given: Mapping[str, Any], gold: Mapping[str, Any]) -> None:
    for problem, ids in (("no prediction for", gold.keys() - given), ("no reference for", given.keys() - gold)):
        if ids:
            raise ValueError(f"{problem} {len(ids)} of {len(gold)} questions, for instance id {min(ids)!r}")
