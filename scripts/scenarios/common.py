"""Models and data that several scenarios share."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from mfac_hf.pruning.options import PruningOptions

VOCABULARY = 60
# Options of pruning that keep what revisions without the scaled Fisher do, and the names that their reports lack.
EMPIRICAL: dict[str, Any] = {"fisher": "empirical"} if hasattr(PruningOptions, "fisher") else {}
_NEW = ("fisher", "fisher_floor")
# Ends of the names under which results hold what differs from run to run, times, speeds and peak memory, and the loss
# curve, which earlier revisions lack.
_VARYING = ("seconds", "runtime", "per_second", "ms_per_step", "date", "memory_gib", "curve")


def shared_data() -> Path | None:
    """Return the folder of real data and models, if there is one."""
    named = os.environ.get("MFAC_SHARED_DATA")
    return Path(named) if named else None


def identity(kind: Any) -> dict[str, str]:
    """The options that make a class or a function that of the paper's metric: none where it knows no other."""
    return {"metric": "identity"} if "metric" in inspect.signature(kind).parameters else {}


def tiny_bert(seed: int = 0, layers: int = 2) -> BertForSequenceClassification:
    """Make a random BERT of width 32, with dropout, so that a disturbed random state shows."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
        )
    )


def sentences(count: int = 64) -> list[dict[str, Any]]:
    """Draw token ids of random lengths, padded."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for i in range(count):
        length = int(torch.randint(4, 13, (1,), generator=generator))
        ids = torch.randint(1, VOCABULARY, (12,), generator=generator)
        mask = torch.arange(12) < length
        data.append({"input_ids": ids * mask, "attention_mask": mask.long(), "labels": torch.tensor(i % 2)})
    return data


def zero_most(model: BertForSequenceClassification) -> BertForSequenceClassification:
    """Zero nine in ten weights of the encoder's matrices."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "encoder" in name and parameter.ndim == 2:
                parameter[torch.rand(parameter.shape, generator=generator) < 0.9] = 0
    return model


def report_of(report: Any) -> dict[str, Any]:
    """Return a `PruningReport` and its masks as a dictionary, without times."""
    return without_times(report.to_dict()) | {"masks": dict(report.masks or {})}


def without_times(value: Any) -> Any:
    """Return the same without what differs from run to run, or is not in reports of older revisions."""
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if not str(key).endswith(_VARYING) and key not in _NEW}
        return {key: without_times(item) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return [without_times(item) for item in value]
    return value
