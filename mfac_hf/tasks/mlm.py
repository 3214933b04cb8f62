"""Masked-language-model training of a small BERT from random weights: text in blocks, and the model.

The text is that of GLUE's SST-2 and of SQuAD's contexts, or generated (`mfac_hf.tasks.toy`), which needs no file.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DataCollatorForLanguageModeling,
    default_data_collator,
)
from transformers.modeling_outputs import MaskedLMOutput

from mfac_hf.tasks.glue import load_glue
from mfac_hf.tasks.toy import toy_dataset

__all__ = [
    "BertForMaskedPositions",
    "generated_texts",
    "mask_once",
    "masking_collator",
    "mlm_model",
    "read_texts",
    "read_vocabulary",
    "token_blocks",
]

_SHUFFLE_SEED = 0
_MASK_SEED = 0
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def read_texts(glue_name: str | None, squad_name: str | None, split: str, cache_dir: str | None = None) -> list[str]:
    """The sentences of SST-2 and the different contexts of SQuAD, in an order that is always the same.

    Args:
        glue_name: GLUE on the Hub or in a local directory; None for no sentences.
        squad_name: SQuAD on the Hub or in a local directory; None for no contexts.
        split: ``train`` or ``validation``.
        cache_dir: where `datasets` keeps what it prepared.
    """
    texts: list[str] = []
    if glue_name is not None:
        texts += load_glue(glue_name, "sst2", cache_dir=cache_dir)[split]["sentence"][:]
    if squad_name is not None:
        contexts: Any = load_dataset(squad_name, split=split, cache_dir=cache_dir)
        texts += dict.fromkeys(contexts["context"][:])
    random.Random(_SHUFFLE_SEED).shuffle(texts)
    return texts


def generated_texts(count: int, split: str) -> list[str]:
    """Different sentences of the generated task, the same for each call; ``split`` as in `read_texts`."""
    return list(toy_dataset(count if split == "train" else 1, count, seed=0)[split]["sentence"])


def read_vocabulary(path: str | os.PathLike[str]) -> BertTokenizer:
    """A lower-casing BERT tokenizer of a ``vocab.txt``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks a special token.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--vocab_file {path}: no such file; give a vocab.txt of BERT, one token in each line")
    tokens = set(Path(path).read_text(encoding="utf-8").split("\n"))
    if missing := [token for token in _SPECIAL_TOKENS if token not in tokens]:
        raise ValueError(f"--vocab_file {path} lacks {', '.join(missing)}: it is no vocabulary of BERT")
    return BertTokenizer(vocab=str(path))


def token_blocks(texts: Iterable[str], tokenizer: BertTokenizer, length: int, count: int) -> Dataset:
    """Cut a text into blocks of the same length: a first token, ``length - 2`` tokens of text, and a last token.

    Sentences follow each other without a mark. Texts are read until there are enough blocks.

    Args:
        texts: the text, in parts.
        tokenizer: gives the tokens, and ``[CLS]`` and ``[SEP]`` for both ends.
        length: tokens in a block, at least 3.
        count: blocks.

    Returns:
        ``count`` rows with ``input_ids``.

    Raises:
        ValueError: the length is too small, or the text too short.
    """
    if length < 3:
        raise ValueError(f"--max_seq_length {length}: expected at least 3, for a token between the two ends")
    blocks: list[list[int]] = []
    rest: list[int] = []
    for text in texts:
        if len(blocks) >= count:
            break
        rest += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        while len(rest) >= length - 2:
            blocks.append([tokenizer.cls_token_id, *rest[: length - 2], tokenizer.sep_token_id])
            del rest[: length - 2]
    if len(blocks) < count:
        raise ValueError(
            f"{count:,} blocks of {length} tokens: the text has {len(blocks):,}; ask for fewer, or give more text"
        )
    return Dataset.from_dict({"input_ids": blocks[:count]})


def masking_collator(tokenizer: BertTokenizer, probability: float = 0.15) -> Callable[[list[Any]], dict[str, Any]]:
    """Makes batches: blocks are masked at random, each time anew; those with labels (`mask_once`) stay as they are."""
    masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)

    def collate(examples: list[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = (default_data_collator if "labels" in examples[0] else masking)(examples)
        return batch

    return collate


def mask_once(blocks: Dataset, tokenizer: BertTokenizer, probability: float = 0.15) -> Dataset:
    """Mask blocks for an evaluation: the same tokens whatever was trained before."""
    masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
    with torch.random.fork_rng(devices=[]):  # the collator's own seed is ignored by some releases where it is 0
        torch.manual_seed(_MASK_SEED)
        batch = masking([{"input_ids": block} for block in blocks["input_ids"]])
    return Dataset.from_dict({name: batch[name].tolist() for name in ("input_ids", "labels")})


class BertForMaskedPositions(BertForMaskedLM):
    """`BertForMaskedLM` that predicts the masked tokens alone: the same loss, a seventh of the head's work.

    With labels the output has no logits. Its weights load into `BertForMaskedLM`.
    """

    def forward(self, input_ids: Any = None, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Mean cross-entropy over the positions whose label is not -100."""
        if labels is None:
            return super().forward(input_ids, **kwargs)
        hidden = self.bert(input_ids, **kwargs)[0]
        masked = labels != -100
        loss = torch.nn.functional.cross_entropy(self.cls(hidden[masked]), labels[masked])
        return MaskedLMOutput(loss=loss)


def mlm_model(
    tokenizer: BertTokenizer, *, seed: int, length: int, hidden_size: int, num_layers: int, dropout: float
) -> BertForMaskedPositions:
    """A small BERT with random weights: heads of 64, a feed-forward width of four times ``hidden_size``.

    Raises:
        ValueError: ``hidden_size`` is no multiple of 64.
    """
    if hidden_size < 64 or hidden_size % 64:
        raise ValueError(f"--hidden_size {hidden_size}: expected a multiple of 64, the width of a head")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForMaskedPositions(config)
