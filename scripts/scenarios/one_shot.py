"""Pruning in one go: a tiny BERT with each option, ResNet-20, and the real models where their files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mfac_hf import prune_one_shot
from mfac_hf.models import MODEL_NAMES, create_model
from scenarios.common import EMPIRICAL, report_of, sentences, shared_data, tiny_bert

__all__ = ["bert", "models", "real_bert", "real_resnet20", "resnet20", "scaled"]

FAST: dict[str, Any] = {
    **{"num_grads": 16, "block_size": 16, "damping": 1e-4, "recomputations": 2, "progress": False},
    **EMPIRICAL,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "batches": {"grad_batch_size": 4, "num_grads": 8},
    "paper": {"selection": "diagonal", "update": "sum"},
    "greedy, sum": {"update": "sum"},
    "diagonal, joint": {"selection": "diagonal"},
    "2:4": {"pattern": "2:4"},
    "block4": {"pattern": "block4"},
    "uniform": {"scope": "uniform"},
    "auto": {"damping": "auto", "loss_samples": 16},
    "full": {"block_size": None, "selection": "diagonal", "pages": 2},
    "full, sum": {"block_size": None, "selection": "diagonal", "update": "sum"},
    "magnitude": {"method": "magnitude", "loss_samples": 8},
    "groups": {"memory_budget": 1 << 19},
}


def cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss of a batch of images."""
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def bert(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """Each option, to half and then to nine in ten weights."""
    found = {}
    for name, given in OPTIONS.items():
        model = tiny_bert().eval()
        found[name] = {}
        for sparsity in (0.5,) if name == "2:4" else (0.5, 0.9):
            report = prune_one_shot(model, DataLoader(sentences(), batch_size=4), sparsity, **{**FAST, **given})
            found[name][str(sparsity)] = report_of(report)
        found[name]["weights"] = model.state_dict()
    return found


def scaled(root: Path, folder: Path, exchange: Path) -> dict[str, Any] | None:
    """The scaled Fisher, by examples and by batches."""
    if not EMPIRICAL:  # an older revision
        return None
    found = {}
    for name in ("default", "batches", "auto"):
        model = tiny_bert().eval()
        options = {**FAST, **OPTIONS[name], "fisher": "scaled"}
        report = prune_one_shot(model, DataLoader(sentences(), batch_size=4), 0.8, **options)
        found[name] = {"report": report_of(report), "weights": model.state_dict()}
    return found


def resnet20(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """A random ResNet-20 on random images."""
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=10).eval()
    data = TensorDataset(torch.randn(16, 3, 32, 32), torch.randint(10, (16,)))
    report = prune_one_shot(model, DataLoader(data), 0.8, loss_fn=cross_entropy, **FAST)
    return {"report": report_of(report), "weights": model.state_dict()}


def real_bert(root: Path, folder: Path, exchange: Path) -> dict[str, Any] | None:
    """BERT-tiny on SST-2."""
    shared = shared_data()
    if shared is None:
        return None
    from datasets import load_dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(shared / "models" / "bert-tiny-mlm", num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "bert-tiny-mlm")
    rows = load_dataset(str(shared / "glue"), "sst2", split="train[:64]", cache_dir=str(exchange / "datasets"))
    features = [{**tokenizer(row["sentence"]), "labels": row["label"]} for row in rows]
    loader = DataLoader(features, batch_size=4, collate_fn=DataCollatorWithPadding(tokenizer))
    report = prune_one_shot(model.eval(), loader, 0.7, **{**FAST, "block_size": 64, "num_grads": 32})
    return {"report": report_of(report), "weights": model.state_dict()}


def real_resnet20(root: Path, folder: Path, exchange: Path) -> dict[str, Any] | None:
    """The M-FAC paper's ResNet-20 on CIFAR-10."""
    shared = shared_data()
    if shared is None:
        return None
    import numpy as np
    from datasets import load_dataset
    from safetensors.torch import load_file

    weights = load_file(shared / "checkpoints" / "mfac_resnet20_cifar10.safetensors")
    model = create_model("resnet20", num_classes=10, weights=weights).eval()
    rows = load_dataset(str(shared / "cifar10"), split="train[:64]", cache_dir=str(exchange / "datasets"))
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in rows["img"]])
    data = TensorDataset(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(rows["label"]))
    options = {**FAST, "grad_batch_size": 2, "loss_samples": 16}
    report = prune_one_shot(model, DataLoader(data), 0.8, loss_fn=cross_entropy, **options)
    return {"report": report_of(report), "weights": model.state_dict()}


def models(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """Weights and logits of the vision models."""
    found = {}
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    for name in set(MODEL_NAMES) - {"resnet50"}:
        torch.manual_seed(0)
        model = create_model(name, num_classes=7).eval()
        with torch.no_grad():
            found[name] = {"weights": list(model.state_dict().values()), "logits": model(images)}
    return found
