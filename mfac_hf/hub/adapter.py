"""Adapters of peft: what is saved of them is a small file of their own weights, to be loaded onto the base model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mfac_hf.hub.architecture import describe_architecture
from mfac_hf.schema import check_schema
from mfac_hf.sparse.directory import find_weights
from mfac_hf.storage import read_json

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_FILE",
    "adapter_directory",
    "base_of",
    "count_parameters",
    "describe_adapter",
    "is_adapter",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
# By peft's name of the task: the class that loads adapter and base model, and the Hub's name of the task.
_TASKS = {
    "SEQ_CLS": ("AutoPeftModelForSequenceClassification", "text-classification"),
    "CAUSAL_LM": ("AutoPeftModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoPeftModelForSeq2SeqLM", "text2text-generation"),
    "TOKEN_CLS": ("AutoPeftModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoPeftModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoPeftModelForFeatureExtraction", "feature-extraction"),
}
# Settings that a card tells. What ``modules_to_save`` comes to is read from the weights: peft names layers there that
# the model may not have.
_SETTINGS = ("r", "lora_alpha", "lora_dropout", "bias", "num_virtual_tokens", "target_modules")
_PREFIX = "base_model.model."  # of names in the file
# Matrices whose rows are the labels, at the end of a name.
_OUTPUTS = ("classifier.weight", "score.weight", "out_proj.weight")


class _Mapping(TypedDict, total=False):
    base_model_class: str | None


class _Config(TypedDict, total=False):
    """What cards read of ``adapter_config.json``."""

    peft_type: str
    task_type: str | None
    base_model_name_or_path: str | None
    auto_mapping: _Mapping | None


def is_adapter(model: nn.Module | str | os.PathLike[str]) -> bool:
    """Whether saving this model writes an adapter, or this directory holds one and no model beside it."""
    if isinstance(model, nn.Module):
        # transformers' own models hold adapters too, after add_adapter
        wrapped = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        return wrapped or bool(getattr(model, "_hf_peft_config_loaded", False))
    return (Path(model) / ADAPTER_CONFIG).is_file() and not find_weights(model)


def base_of(model: nn.Module) -> nn.Module:
    """Return the model that peft has wrapped; any other model itself."""
    source: Any = model
    return source.get_base_model() if is_adapter(model) and hasattr(source, "get_base_model") else model


def count_parameters(model: nn.Module) -> dict[str, int]:
    """How many numbers of a model with an adapter are trained, and how many it has in all, the adapter among them."""
    source: Any = model
    if hasattr(model, "get_nb_trainable_parameters"):  # knows weights that are packed in fewer bits
        trainable, total = source.get_nb_trainable_parameters()
    else:
        total = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trainable_parameters": trainable, "total_parameters": total}


@contextmanager
def adapter_directory(model: nn.Module | str | os.PathLike[str]) -> Iterator[Path]:
    """Give the directory of an adapter; that of a model is written for the block, with its active adapter."""
    if not isinstance(model, nn.Module):
        yield Path(model)
        return
    source: Any = model
    with tempfile.TemporaryDirectory() as folder:
        if not hasattr(model, "get_base_model"):
            source.save_pretrained(folder)
            yield Path(folder)
            return
        name = source.active_adapter
        if not isinstance(name, str):
            name = name[0]
        source.save_pretrained(folder, selected_adapters=[name])
        # peft writes every adapter but the default one into a folder of its own
        yield Path(folder) if name == "default" else Path(folder, name)


def describe_adapter(directory: str | os.PathLike[str], base: nn.Module | None = None) -> dict[str, Any]:
    """Gather what a card says of an adapter, in place of what it says of a model.

    Args:
        directory: directory of the adapter.
        base: the base model, where it is at hand; its class tells the task where the adapter does not.

    Returns:
        Plain JSON types, as in the facts of a card: ``model`` (with ``adapter``: its ``type``, ``base``,
        ``base_class`` and ``settings``; of LoRA also ``whole``, the numbers in each layer that is saved in full, and
        ``labels``, how many a classifier's head has, None where it is not in the file), ``weights`` and ``files``.

    Raises:
        FileNotFoundError: there is no ``adapter_model.safetensors``.
        ValueError: a file of the adapter is damaged, or of another form.
    """
    path = Path(directory) / ADAPTER_CONFIG
    config = read_json(path)
    check_schema(config, _Config, str(path))
    weights = Path(directory) / ADAPTER_FILE
    if not weights.is_file():
        raise FileNotFoundError(
            f"{directory} has no {ADAPTER_FILE}: save the adapter anew with save_pretrained, which writes safetensors"
        )
    try:
        with safe_open(weights, framework="pt") as file:
            tensors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{weights} is no safetensors file, or a damaged one: {error}") from error
    numel = sum(t.numel() for t in tensors.values())
    zeros = numel - sum(int(t.count_nonzero()) for t in tensors.values())
    known = (config.get("auto_mapping") or {}).get("base_model_class")
    name, task = _TASKS.get(str(config.get("task_type")), ("AutoPeftModel" if known else "PeftModel", None))
    base_class = known or (None if base is None else type(base).__name__)
    if task is None and base_class:
        task = describe_architecture(Path(directory), f"transformers.{base_class}")["task"]
    settings = {key: config[key] for key in _SETTINGS if config.get(key) not in (None, [], "none", 0)}
    adapter = {
        "type": config.get("peft_type", "peft"),
        "base": config.get("base_model_name_or_path"),
        "base_class": base_class,
        "settings": settings,
        **(_whole_layers(tensors, task) if config.get("peft_type") == "LORA" else {}),
    }
    return {
        "model": {"class": f"peft.{name}", "library": "peft", "task": task, "adapter": adapter},
        "weights": {"numel": numel, "zeros": zeros, "targets": {"numel": 0, "zeros": 0}, "tensors": []},
        "files": {ADAPTER_FILE: weights.stat().st_size},
    }


def _whole_layers(tensors: Mapping[str, Tensor], task: str | None) -> dict[str, Any]:
    """What a file of LoRA holds beside the factors: the numbers in each layer, and the labels of a classifier."""
    whole: dict[str, int] = {}
    labels = []
    for name, tensor in tensors.items():
        if "lora_" in name:
            continue
        layer = name.removesuffix(".weight")
        if name.endswith(".bias") and name.removesuffix("bias") + "weight" in tensors:
            layer = name.removesuffix(".bias")
        whole[layer] = whole.get(layer, 0) + tensor.numel()
        if tensor.ndim == 2 and name.endswith(_OUTPUTS):
            labels.append(len(tensor))
    is_classifier = task in ("text-classification", "token-classification")
    return {"whole": whole, "labels": labels[0] if is_classifier and len(labels) == 1 else None}
