"""A generated sentiment task in which word order decides: negation, contrast and hearsay.

The grammar (terminals in quotes, ``?`` optional, ``|`` alternatives)::

    sentence  = (opener ",")? body ("," closer)? "."
    body      = clause                              label: the clause
              | clause "," "but" clause             label: the second clause
              | "although" clause "," clause        label: the second clause
              | clause "," "although" clause        label: the first clause
    clause    = "the" aspect hearsay? verb negator? intensifier? adjective
    hearsay   = "," "which" speaker "called" intensifier? adjective ","

A clause is as positive as its adjective, and a negator flips it. Intensifiers, openers, closers and what other people
called something change nothing. Joined clauses always have opposite polarity, so that exchanging them gives the same
bag of words and the other label: no classifier that only counts words gets these sentences right. A small BERT,
whose attention sees positions, can learn the rule exactly.

Everything is built here from a seed: no file and no network is needed, and `toy_rows` does without ``datasets``.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, EvalPrediction

if TYPE_CHECKING:
    from datasets import DatasetDict

LABEL_NAMES = ("negative", "positive")

# fmt: off
POSITIVE = (
    "brilliant charming clever compelling dazzling delightful elegant enchanting excellent fascinating fresh funny "
    "graceful gripping heartfelt lively lovely memorable moving original stunning superb thoughtful wonderful"
).split()
NEGATIVE = (
    "awful awkward banal bland boring clumsy confusing contrived dismal dreary dull empty flat forgettable grating "
    "hollow lifeless messy pointless predictable shallow sloppy tedious wooden"
).split()
NEGATORS = ("not", "never", "hardly", "scarcely")
CONTRASTS = ("but", "although")
INTENSIFIERS = (
    "absolutely", "completely", "deeply", "extremely", "incredibly", "quite", "rather", "really", "remarkably",
    "thoroughly", "truly", "utterly", "very",
)
VERBS = ("was", "is", "seemed", "felt", "remained", "proved", "looked")
ASPECTS = (
    "acting animation atmosphere beginning camerawork cast choreography climax comedy composition costumes dialogue "
    "direction drama editing ending ensemble film finale humor lighting lead makeup movie music mystery narration "
    "opening pacing performance photography plot premise production romance scenery score screenplay script sequel "
    "singing soundtrack staging story storytelling style villain voiceover writing"
).split()
SPEAKERS = (
    "critics", "everybody", "my brother", "my neighbor", "my sister", "our host", "the director", "the newspaper",
    "the radio", "the trailer", "two friends", "some students",
)
OPENERS = (
    "after a long week", "all things considered", "as a birthday present", "during the festival", "for the record",
    "in a crowded theater", "last night on television", "on a rainy sunday", "seen in the original language",
    "to answer your question", "with subtitles", "without any preparation",
)
CLOSERS = (
    "and it runs for two hours", "and that is my view", "and we paid at the door", "as i told my family",
    "at least on a small screen", "for what it is worth", "if you ask me", "so much for the evening",
    "to my surprise", "we both thought",
)
# fmt: on

_OPENER_RATE = 0.3
_CLOSER_RATE = 0.3
_HEARSAY_RATE = 0.1
_INTENSIFIER_RATE = 0.4
# Plain sentences without a negator keep a little of what single adjectives tell, so that a model can start learning.
# With an exact XOR of adjective and negator it would sit on a plateau for longer than a demonstration may take.
_NEGATION_RATE = 0.25
_PLAIN_RATE = 0.35

_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MAX_LENGTH = 64
# BERT's usual 0.02 suits widths of several hundred. This value served AdamW best of those tried before M-FAC saw the
# task, and M-FAC needs it: from 0.02 it stayed at chance in three trials of 1000 steps, where AdamW reached 0.94
# (0.97 from 0.06).
_INITIALIZER_RANGE = 0.06


def _described(rng: random.Random, polarity: int) -> str:
    """An adjective of the given polarity (0 or 1), perhaps intensified."""
    adjective = rng.choice(POSITIVE if polarity else NEGATIVE)
    return f"{rng.choice(INTENSIFIERS)} {adjective}" if rng.random() < _INTENSIFIER_RATE else adjective


def _clause(rng: random.Random, polarity: int) -> str:
    """A clause whose meaning has the given polarity (0 or 1)."""
    words = ["the", rng.choice(ASPECTS)]
    if rng.random() < _HEARSAY_RATE:
        words.append(f", which {rng.choice(SPEAKERS)} called {_described(rng, rng.randrange(2))} ,")
    words.append(rng.choice(VERBS))
    if rng.random() < _NEGATION_RATE:
        words.append(rng.choice(NEGATORS))
        polarity = 1 - polarity
    words.append(_described(rng, polarity))
    return " ".join(words)


def _sentence(rng: random.Random, label: int) -> str:
    """A sentence of the grammar with the given label (0 or 1)."""
    main = _clause(rng, label)
    if rng.random() < _PLAIN_RATE:
        body = main
    else:
        aside = _clause(rng, 1 - label)
        body = rng.choice((f"{aside} , but {main}", f"although {aside} , {main}", f"{main} , although {aside}"))
    opener = f"{rng.choice(OPENERS)} , " if rng.random() < _OPENER_RATE else ""
    closer = f" , {rng.choice(CLOSERS)}" if rng.random() < _CLOSER_RATE else ""
    return f"{opener}{body}{closer} ."


def toy_rows(num_train: int = 32768, num_validation: int = 1024, *, seed: int = 0) -> dict[str, list[tuple[str, int]]]:
    """Generate the task's splits.

    Labels alternate before a shuffle, so each split is balanced (within one example if its size is odd). No sentence
    occurs twice, neither within a split nor across the two.

    Args:
        num_train: sentences in ``train``, at least 1.
        num_validation: sentences in ``validation``, at least 1.
        seed: decides every sentence and their order; equal seeds and sizes give equal data.

    Returns:
        Splits ``train`` and ``validation``: pairs of a sentence (words separated by blanks) and its label (0 negative,
        1 positive).

    Raises:
        ValueError: a split would be empty.
    """
    sizes = {"train": num_train, "validation": num_validation}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"the {name} split needs at least 1 sentence, got {size}: raise num_{name}")
    rng = random.Random(seed)
    seen: set[str] = set()
    splits = {}
    for name, size in sizes.items():
        rows: list[tuple[str, int]] = []
        while len(rows) < size:
            label = len(rows) % 2
            sentence = _sentence(rng, label)
            if sentence not in seen:
                seen.add(sentence)
                rows.append((sentence, label))
        rng.shuffle(rows)
        splits[name] = rows
    return splits


def toy_dataset(num_train: int = 32768, num_validation: int = 1024, *, seed: int = 0) -> DatasetDict:
    """The splits of `toy_rows` with the columns ``sentence`` (string) and ``label`` (`datasets.ClassLabel`).

    Args:
        num_train: sentences in ``train``, at least 1.
        num_validation: sentences in ``validation``, at least 1.
        seed: decides every sentence and their order; equal seeds and sizes give equal data.

    Raises:
        ValueError: a split would be empty.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value  # here: not every machine has it

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=list(LABEL_NAMES))})
    return DatasetDict(
        {
            name: Dataset.from_list([{"sentence": text, "label": label} for text, label in rows], features=features)
            for name, rows in toy_rows(num_train, num_validation, seed=seed).items()
        }
    )


def toy_features(splits: DatasetDict) -> DatasetDict:
    """The splits of `toy_dataset` as a model reads them: token ids in place of sentences."""
    tokenizer = toy_tokenizer()
    return splits.map(lambda rows: tokenizer(rows["sentence"]), batched=True, remove_columns="sentence")


def toy_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of sentences whose larger logit is the label's, for ``Trainer(compute_metrics=...)``."""
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


def toy_tokenizer() -> BertTokenizer:
    """Build a BERT tokenizer whose vocabulary is exactly the grammar's words, one token per word."""
    phrases = (*POSITIVE, *NEGATIVE, *NEGATORS, *CONTRASTS, *INTENSIFIERS, *VERBS, *ASPECTS)
    phrases += (*SPEAKERS, *OPENERS, *CLOSERS, "the which called , .")
    words = sorted({word for phrase in phrases for word in phrase.split()})
    vocab = {token: index for index, token in enumerate((*_SPECIAL_TOKENS, *words))}
    return BertTokenizer(vocab=vocab, model_max_length=_MAX_LENGTH)


def toy_model(
    *, seed: int = 0, hidden_size: int = 64, num_layers: int = 2, num_heads: int = 2
) -> BertForSequenceClassification:
    """Build a small BERT classifier for `toy_tokenizer`, initialised at random and without dropout.

    Sentences can be generated in any number, so that training need not see one twice and has nothing to overfit.

    Args:
        seed: seed of the weights; the caller's random state is left as it was.
        hidden_size: width; the feed-forward width is four times as large.
        num_layers: number of encoder layers.
        num_heads: attention heads in a layer.

    Returns:
        The model, on the CPU and in training mode.

    Raises:
        ValueError: ``num_heads`` does not divide ``hidden_size``.
    """
    tokenizer = toy_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=_MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=_INITIALIZER_RANGE,
        id2label=dict(enumerate(LABEL_NAMES)),
        label2id={name: index for index, name in enumerate(LABEL_NAMES)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)
