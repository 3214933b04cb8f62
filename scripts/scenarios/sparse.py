"""Sparse files to the byte, what is read back from them, and inference with sparse layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from mfac_hf import load_sparse, save_sparse, to_sparse_inference
from mfac_hf.models import create_model
from scenarios.common import sentences, tiny_bert, zero_most

__all__ = ["files", "inference"]


def files(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """Files of a BERT in two dtypes and of a ResNet-20; the older revision's are read."""
    found: dict[str, Any] = {}
    resnet = create_model("resnet20", num_classes=10)
    with torch.no_grad():
        for i, parameter in enumerate(resnet.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape).round(decimals=3))
            parameter[parameter.abs() < 0.1 * (i % 10)] = 0
    models = {"bert": zero_most(tiny_bert()), "half": zero_most(tiny_bert()).bfloat16(), "resnet20": resnet}
    for name, model in models.items():
        path = save_sparse(model, folder / name)
        given = exchange / f"{name}.safetensors"
        if not given.exists():
            given.write_bytes(path.read_bytes())
        written = {item.name: item.read_bytes() for item in (folder / name).iterdir()}
        found[name] = {"written": written, "read": load_sparse(given)}
    found["built"] = load_sparse(folder / "bert", AutoModelForSequenceClassification).state_dict()
    return found


@torch.no_grad()
def inference(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """Logits of a BERT all of whose sparse layers are replaced."""
    model = to_sparse_inference(zero_most(tiny_bert()), min_speedup=0)
    rows = sentences(8)
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask")}
    return {"logits": model(**batch).logits, "weights": model.state_dict()}
