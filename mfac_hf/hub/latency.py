"""Time a forward pass on this machine, dense and with sparse layers."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mfac_hf.hub.architecture import load_model
from mfac_hf.machine import cpu_name
from mfac_hf.sparse.inference import SparseLinear, to_sparse_inference

__all__ = ["measure_latency", "with_latency"]

ROUNDS = 15


def with_latency(facts: Mapping[str, Any], model: nn.Module | str | os.PathLike[str]) -> dict[str, Any]:
    """Return the facts of a card with the latency of the model that they are about, measured now.

    The directory of an adapter, or of a model with code of its own, is not measured.

    Args:
        facts: what `mfac_hf.hub.facts.collect` returned.
        model: the model, or a directory that holds it.
    """
    described = facts["model"]
    if not isinstance(model, nn.Module) and ("adapter" in described or described.get("custom_code")):
        return dict(facts)  # needs the base model, or runs code of strangers
    loaded = model if isinstance(model, nn.Module) else load_model(model, described["class"])
    return {**facts, "latency": measure_latency(loaded, facts["sparse"])}


@torch.inference_mode()
def measure_latency(model: nn.Module, sparse: bool) -> dict[str, Any]:
    """Time a forward pass over one example: 128 tokens (or as many as the model has positions), or 3 x 32 x 32 pixels.

    Args:
        model: the model, on the device to measure.
        sparse: whether to time it with sparse layers too (`mfac_hf.to_sparse_inference`), in turns with the dense one.

    Returns:
        Plain JSON types: ``seconds`` of ``dense`` and ``sparse`` (medians of ``calls``), ``example``,
        ``sparse_layers``, ``hardware``, ``threads``, ``torch``.
    """
    model = model.eval()
    device = next(model.parameters()).device
    example, what, tokens = _example(model, device)
    # An encoder-decoder needs what the decoder has written so far.
    decoded = (
        {"decoder_input_ids": example} if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else {}
    )
    contenders = {"dense": model}
    layers = 0
    if sparse:
        contenders["sparse"] = to_sparse_inference(model, tokens=tokens)
        layers = sum(isinstance(module, SparseLinear) for module in contenders["sparse"].modules())
    times: dict[str, list[float]] = {key: [] for key in contenders}
    for _ in range(ROUNDS + 1):
        for key, contender in contenders.items():
            started = time.perf_counter()
            contender(example, **decoded)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[key].append(time.perf_counter() - started)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "example": what,
        "seconds": {key: statistics.median(spent[1:]) for key, spent in times.items()},  # the first one warms up
        "sparse_layers": layers,
        "calls": ROUNDS,
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _example(model: nn.Module, device: torch.device) -> tuple[Tensor, str, int]:
    """Make an input of the model; return it, its name in words, and the rows that linear layers get from it."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "vocab_size"):
        length = min(128, getattr(config, "max_position_embeddings", 128))
        return torch.randint(0, config.vocab_size, (1, length), device=device), f"1 x {length} tokens", length
    size = getattr(config, "image_size", 32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    image = torch.randn(1, getattr(config, "num_channels", 3), height, width, device=device)
    return image, f"1 image of {height} x {width}", 1
