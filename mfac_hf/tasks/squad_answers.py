"""SQuAD v1.1 and v2.0: logits to answers and scores.

The spans of all windows of a question compete by the sum of their start and end logits; in version 2 also with "no
answer", whose score is that of the ``[CLS]`` token (Devlin et al. 2019, arXiv:1810.04805, section 4.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.special import softmax
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from mfac_hf.tasks.squad import NULL_POSITION
from mfac_hf.tasks.squad_metric import SquadMetric


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are chosen.

    Attributes:
        n_best_size: spans to keep of each question.
        max_answer_length: tokens of the longest answer.
        version_2_with_negative: whether "no answer" competes.
        null_score_diff_threshold: how far its score must exceed that of the best span.

    Raises:
        ValueError: a limit is below 1.
    """

    n_best_size: int = 20
    max_answer_length: int = 30
    version_2_with_negative: bool = False
    null_score_diff_threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.n_best_size < 1 or self.max_answer_length < 1:
            raise ValueError(
                f"n_best_size {self.n_best_size} and max_answer_length {self.max_answer_length} must be at least 1"
            )


@dataclass(frozen=True)
class SquadPredictions:
    """Answers by question id.

    Attributes:
        texts: the answer; empty for "no answer".
        nbest: the best spans of the question, best first: ``text``, ``start`` (character in the context),
            ``score`` (sum of the logits) and ``probability`` (softmax over the list). In version 2 the null answer
            is among them, with an empty text and ``start`` None.
        null_score_diffs: score of no answer minus that of the best span; empty in version 1.
    """

    texts: dict[str, str]
    nbest: dict[str, list[dict[str, Any]]]
    null_score_diffs: dict[str, float]

    @property
    def best_spans(self) -> dict[str, str]:
        """The best answer that is not "no answer"."""
        return {
            name: next(entry["text"] for entry in rows if entry["start"] is not None)
            for name, rows in self.nbest.items()
        }


def extract_answers(
    examples: Dataset,
    features: Dataset,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    options: AnswerOptions | None = None,
) -> SquadPredictions:
    """Find the spans of the context with the highest sum of start and end logit.

    All spans of at most ``max_answer_length`` tokens of each window compete, not only those between the best starts
    and ends. A span seen in two windows counts with its better score. The null score of a question is the least over
    its windows of the logits at ``[CLS]``, since one window that holds the answer is enough. In version 2 the
    answer is empty where the null score exceeds the best span's by more than ``null_score_diff_threshold``.

    Args:
        examples: the questions, with ``id`` and ``context``.
        features: their `squad_features`.
        start_logits: shape (features, tokens), in the order of the features; wider than a feature is fine.
        end_logits: the same.
        options: how answers are chosen; None for the defaults.

    Raises:
        ValueError: the logits do not fit the features or are not finite, or features and examples have different ids.
    """
    options = options or AnswerOptions()
    contexts = dict(zip(examples["id"], examples["context"], strict=True))
    spans, nulls = _score_spans(contexts, features, start_logits, end_logits, options)
    result = SquadPredictions({}, {}, {})
    for name, seen in spans.items():
        rows = sorted(((score, span) for span, score in seen.items()), key=lambda row: (-row[0], row[1]))
        entries = [
            {"text": contexts[name][start:end], "start": start, "score": score}
            for score, (start, end) in rows[: options.n_best_size]
        ]
        result.texts[name] = entries[0]["text"]
        if options.version_2_with_negative:
            difference_to_null = nulls[name] - entries[0]["score"]
            result.null_score_diffs[name] = difference_to_null
            if difference_to_null > options.null_score_diff_threshold:
                result.texts[name] = ""
            entries.append({"text": "", "start": None, "score": nulls[name]})
            entries.sort(key=lambda entry: -entry["score"])
        for entry, probability in zip(entries, softmax([entry["score"] for entry in entries]).tolist(), strict=True):
            entry["probability"] = probability
        result.nbest[name] = entries
    return result


def _score_spans(
    contexts: Mapping[str, str],
    features: Dataset,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    options: AnswerOptions,
) -> tuple[dict[str, dict[tuple[int, int], float]], dict[str, float]]:
    """By question, the best spans (characters) of each of its windows with their scores, and the null score."""
    names = list(features["example_id"])
    if difference := contexts.keys() ^ set(names):
        raise ValueError(
            f"features and examples differ in {len(difference)} of {len(contexts)} ids, for instance "
            f"{min(difference)!r}: cut the features from these examples"
        )
    columns = features.with_format("numpy", columns=["context_position", "token_starts", "token_ends"])[:]
    windows = list(zip(*(columns[key] for key in ("context_position", "token_starts", "token_ends")), strict=True))
    _check_logits(start_logits, end_logits, [position + len(starts) for position, starts, _ in windows])
    longest = max((len(starts) for _, starts, _ in windows), default=0)
    firsts, lasts = _spans_by_end(longest, options.max_answer_length)

    spans: dict[str, dict[tuple[int, int], float]] = {name: {} for name in contexts}
    nulls = dict.fromkeys(contexts, np.inf)
    for row, (name, (position, starts_T, ends_T)) in enumerate(zip(names, windows, strict=True)):
        start_T = start_logits[row, position : position + len(starts_T)]
        end_T = end_logits[row, position : position + len(starts_T)]
        count = int(np.searchsorted(lasts, len(starts_T)))
        scores, best = start_T[firsts[:count]] + end_T[lasts[:count]], np.arange(count)
        if count > options.n_best_size:
            best = np.argpartition(scores, -options.n_best_size)[-options.n_best_size :]
        seen = spans[name]
        for first, last, score in zip(firsts[best], lasts[best], scores[best].tolist(), strict=True):
            span = (int(starts_T[first]), int(ends_T[last]))
            seen[span] = max(seen.get(span, -np.inf), score)
        nulls[name] = min(nulls[name], float(start_logits[row, NULL_POSITION] + end_logits[row, NULL_POSITION]))
    return spans, nulls


def _check_logits(start_logits: np.ndarray, end_logits: np.ndarray, lengths: list[int]) -> None:
    """Raise ValueError unless there is a finite logit for every token of every feature."""
    shape = (len(lengths), max(lengths, default=0))
    for name, logits in (("start_logits", start_logits), ("end_logits", end_logits)):
        if logits.ndim != 2 or logits.shape[0] != shape[0] or logits.shape[1] < shape[1]:
            raise ValueError(f"{name} have shape {logits.shape}; expected {shape[0]} features of >= {shape[1]} tokens")
        if not np.isfinite(logits).all():
            raise ValueError(
                f"{int((~np.isfinite(logits)).sum())} of {logits.size} {name} are not finite: training diverged; "
                "try a lower learning rate or more damping"
            )


def _spans_by_end(length: int, max_answer_length: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last token of all spans, ordered by the last: those of a shorter window come first."""
    lasts, back = np.divmod(np.arange(length * max_answer_length), max_answer_length)
    inside = back <= lasts
    return (lasts - back)[inside], lasts[inside]


class SquadEvaluation:
    """``compute_metrics`` for an unmodified Trainer: from the logits of the evaluation features to EM and F1.

    Trainer shows the metric function only logits and labels, so this object keeps the questions and features. The
    labels prove that Trainer kept their order.

    Args:
        examples: the questions.
        features: their `squad_features`, which Trainer evaluates.
        options: how answers are chosen; None for the defaults.
    """

    def __init__(self, examples: Dataset, features: Dataset, options: AnswerOptions | None = None) -> None:
        self.examples = examples
        self.features = features
        self.options = options or AnswerOptions()
        self.references = [
            {"id": name, "answers": answers} for name, answers in zip(examples["id"], examples["answers"], strict=True)
        ]
        self._metric = SquadMetric()

    def answers(self, output: EvalPrediction | PredictionOutput) -> SquadPredictions:
        """Find the answers in what Trainer collected from the features.

        Raises:
            ValueError: the output does not belong to the features, or see `extract_answers`.
        """
        labels = np.asarray(output.label_ids)
        expected = np.array([self.features["start_positions"][:], self.features["end_positions"][:]])
        if labels.shape != expected.shape or (labels != expected).any():
            raise ValueError(
                f"the labels that came with the logits {labels.shape} are not those of the {len(self.features)} "
                "features in their order: evaluate these features, without --train_sampling_strategy group_by_length"
            )
        start_logits, end_logits = list(output.predictions)[:2]
        return extract_answers(self.examples, self.features, start_logits, end_logits, self.options)

    def __call__(self, output: EvalPrediction | PredictionOutput) -> dict[str, float]:
        """Score the answers: the values of `SquadMetric`."""
        predictions = [{"id": name, "prediction_text": text} for name, text in self.answers(output).texts.items()]
        scores = self._metric.compute(predictions=predictions, references=self.references)
        assert scores is not None  # only a secondary process of a distributed metric gets None
        return scores
