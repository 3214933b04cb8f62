"""SQuAD v1.1 and v2.0: data to features.

A context longer than the model's input is cut into windows that overlap by ``doc_stride`` tokens. Each window is one
feature. It carries the answer as token positions (the ``[CLS]`` token, at 0, where the window lacks the answer) and
keeps the id of its question and the characters that each context token covers, from which `squad_answers` reads the
predicted text (Devlin et al. 2019, arXiv:1810.04805, sections 4.2 and 4.3).
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Those of the published script of Devlin et al. 2019, in tokens.
MAX_SEQ_LENGTH, DOC_STRIDE, MAX_QUERY_LENGTH = 384, 128, 64
COLUMNS = ("id", "context", "question", "answers")
NULL_POSITION = 0
"""Token that stands for "no answer here": ``[CLS]``, which is first in every feature."""
HOLDOUT_SEED = 1
"""Seed of the articles to hold out; apart from the training seed, so that every run holds out the same ones."""


def load_squad(
    name: str, split: str, *, version_2_with_negative: bool = False, cache_dir: str | None = None
) -> Dataset:
    """Load a split of a data set with SQuAD's columns.

    Args:
        name: name on the Hub, such as ``rajpurkar/squad``, or a local directory laid out like that repository.
        split: ``train`` or ``validation``.
        version_2_with_negative: whether questions without an answer are expected.
        cache_dir: where `datasets` keeps what it prepared.

    Raises:
        ValueError: the split or a column is missing, an id occurs twice, or a question has no answer although
            ``version_2_with_negative`` is False.
    """
    splits = load_dataset(name, cache_dir=cache_dir)
    assert isinstance(splits, DatasetDict)
    if split not in splits:
        raise ValueError(
            f"{name} has no split {split!r}, only {sorted(splits)}; take that split from another data set"
        )
    examples = splits[split]
    if missing := [column for column in COLUMNS if column not in examples.column_names]:
        raise ValueError(f"{name} ({split}) lacks the columns {missing}; it has {examples.column_names}")
    ids = examples["id"]
    if len(set(ids)) != len(ids):
        twice, count = Counter(ids).most_common(1)[0]
        raise ValueError(f"{name} ({split}) has {count} rows of id {twice!r}; ids must be unique")
    if not version_2_with_negative:
        for name_of, answers in zip(ids, examples["answers"], strict=True):
            if not answers["text"]:
                raise ValueError(
                    f"question {name_of!r} of {name} ({split}) has no answer: for SQuAD v2 set version_2_with_negative"
                )
    return examples


def hold_out_articles(examples: Dataset, fraction: float, *, seed: int = HOLDOUT_SEED) -> tuple[Dataset, Dataset]:
    """Split the rows by article, so that no context and no topic is on both sides.

    Args:
        examples: rows with the column ``title``.
        fraction: share of the articles to hold out, between 0 and 1; rounded, at least one on each side.
        seed: of the choice, which depends on the set of titles alone.

    Returns:
        The rows to train on and the rows held out, both in their old order.

    Raises:
        ValueError: no titles, fewer than two articles, or a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction of articles to hold out must lie between 0 and 1, got {fraction}")
    if "title" not in examples.column_names:
        raise ValueError(f"holding out articles needs the column 'title'; there are only {examples.column_names}")
    of_row = list(examples["title"])
    titles = sorted(set(of_row))
    if len(titles) < 2:
        raise ValueError(f"holding out articles needs at least 2 of them, got {len(titles)}")
    count = min(max(round(fraction * len(titles)), 1), len(titles) - 1)
    held_out = set(random.Random(seed).sample(titles, count))
    rows: tuple[list[int], list[int]] = ([], [])
    for row, title in enumerate(of_row):
        rows[title in held_out].append(row)
    return examples.select(rows[0]), examples.select(rows[1])


def squad_features(
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int = MAX_SEQ_LENGTH,
    doc_stride: int = DOC_STRIDE,
    max_query_length: int = MAX_QUERY_LENGTH,
) -> Dataset:
    """Cut questions and contexts into the model's inputs, one or more for each example.

    The answer is labelled in every window that holds all of it, by the tokens that its characters touch. Features
    are not padded, which is the collator's part. Training and evaluation take the same features: with labels Trainer
    logs the evaluation loss, which for several accepted answers is that of the first.

    Args:
        examples: rows of `load_squad`.
        tokenizer: a fast tokenizer that pads on the right and begins with ``[CLS]``.
        max_seq_length: tokens of a window, question and special tokens included.
        doc_stride: tokens that consecutive windows of a context share.
        max_query_length: tokens of a question that are kept; the rest is cut off, which a warning says.

    Returns:
        The tokenizer's columns, ``start_positions`` and ``end_positions`` (inclusive) and, for `extract_answers`,
        ``example_id``, ``context_position`` (of the window's first context token) and ``token_starts``,
        ``token_ends`` (characters of each context token in the context, end exclusive).

    Raises:
        ValueError: an unsuitable tokenizer, lengths that leave no room for a context, an answer that is not where
            ``answer_start`` says, or a context without a token.
    """
    _check_lengths(tokenizer, max_seq_length, doc_stride, max_query_length)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        answers = [
            _answer_characters(*row) for row in zip(batch["id"], batch["context"], batch["answers"], strict=True)
        ]
        encoded = tokenizer(
            _shorten(batch["question"], tokenizer, max_query_length),
            batch["context"],
            truncation="only_second",
            max_length=max_seq_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        rows = encoded.pop("overflow_to_sample_mapping")
        windows = [
            _window(batch["id"][row], encoded.sequence_ids(number), offsets, answers[row])
            for number, (row, offsets) in enumerate(zip(rows, encoded.pop("offset_mapping"), strict=True))
        ]
        return {**encoded, **{name: [window[name] for window in windows] for name in windows[0]}}

    return examples.map(encode, batched=True, remove_columns=examples.column_names, desc="cutting into features")


def _window(
    name: str, parts: list[int | None], offsets: list[tuple[int, int]], answer: tuple[int, int] | None
) -> dict[str, Any]:
    """The columns that a feature has beside the tokenizer's.

    Args:
        name: id of the question.
        parts: for each token 1 where it is of the context.
        offsets: for each token its characters.
        answer: its characters in the context; None if there is none.
    """
    if 1 not in parts:
        raise ValueError(f"the context of question {name!r} has no token: filter such rows")
    position = parts.index(1)
    characters_T2 = np.array(offsets[position : position + parts.count(1)], dtype=np.int32)
    start, end = _label(characters_T2, answer)
    return {
        "start_positions": NULL_POSITION if start is None else position + start,
        "end_positions": NULL_POSITION if end is None else position + end,
        "example_id": name,
        "context_position": position,
        "token_starts": characters_T2[:, 0],
        "token_ends": characters_T2[:, 1],
    }


def _check_lengths(
    tokenizer: PreTrainedTokenizerBase, max_seq_length: int, doc_stride: int, max_query_length: int
) -> None:
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer and gives no character offsets")
    if tokenizer.padding_side != "right" or tokenizer("a")["input_ids"][0] != tokenizer.cls_token_id:
        raise ValueError(
            f"{type(tokenizer).__name__} pads on the {tokenizer.padding_side}, its class token is "
            f"{tokenizer.cls_token!r}; expected one that pads on the right and puts its class token first, as BERT's"
        )
    if not 0 < max_seq_length <= tokenizer.model_max_length:
        raise ValueError(
            f"max_seq_length is {max_seq_length}; expected 1 to {tokenizer.model_max_length}, the model's limit"
        )
    special = tokenizer.num_special_tokens_to_add(pair=True)
    room = max_seq_length - max_query_length - special
    if not (0 <= doc_stride < room and max_query_length > 0):
        raise ValueError(
            f"a window of max_seq_length {max_seq_length} has room for {room} context tokens beside max_query_length "
            f"{max_query_length} and {special} special tokens; expected more than doc_stride {doc_stride}: "
            "raise the first, or lower max_query_length (not below 1) or doc_stride (not below 0)"
        )


def _shorten(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_query_length: int) -> list[str]:
    """Cut the text of each question after ``max_query_length`` tokens."""
    windows = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if long := sum(len(offsets) > max_query_length for offsets in windows):
        logger.warning("%d questions are cut to max_query_length %d tokens", long, max_query_length)
    return [
        question if len(offsets) <= max_query_length else question[: offsets[max_query_length - 1][1]]
        for question, offsets in zip(questions, windows, strict=True)
    ]


def _answer_characters(name: str, context: str, answers: Mapping[str, Sequence[Any]]) -> tuple[int, int] | None:
    """First and end (exclusive) character of the first answer; None if there is none."""
    texts, starts = answers["text"], answers["answer_start"]
    if len(texts) != len(starts):
        raise ValueError(f"question {name!r} has {len(texts)} answers but {len(starts)} values of answer_start")
    for text, start in zip(texts, starts, strict=True):
        if not text.strip() or start < 0 or not context.startswith(text, start):
            raise ValueError(
                f"question {name!r}: answer {text!r} is not at answer_start {start} of its context, which has "
                f"{len(context)} characters and there reads {context[max(start, 0) :][: len(text) + 10]!r}; "
                "mend or filter such rows"
            )
    if not texts:
        return None
    # Blanks around an answer belong to no token.
    start = starts[0] + len(texts[0]) - len(texts[0].lstrip())
    return start, start + len(texts[0].strip())


def _label(characters_T2: np.ndarray, answer: tuple[int, int] | None) -> tuple[int | None, int | None]:
    """First and last of the context tokens (T) that the answer touches, or None twice if it leaves the window."""
    starts_T, ends_T = characters_T2.T
    if answer is None or answer[0] < starts_T[0] or answer[1] > ends_T[-1]:
        return None, None
    first = int(np.searchsorted(ends_T, answer[0], side="right"))
    last = int(np.searchsorted(starts_T, answer[1], side="left")) - 1
    return (first, last) if first <= last else (None, None)
