"""Targets: the weights of a model that pruning may touch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from mfac_hf.pruning.masks import shortened

__all__ = ["find_targets"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LINEAR = (nn.Linear, Conv1D)


def find_targets(model: nn.Module, patterns: Sequence[str] | str | None = None) -> dict[str, nn.Parameter]:
    r"""Choose the weights to prune.

    By default the targets of a Hugging Face transformer are the linear layers inside its stacks of layers: attention
    and feed-forward, but no embeddings, normalisation, biases, pooler, task head or language-model head. Those of any
    other model (a convolutional network) are the weights of all convolutions and linear layers, with the classifier.

    Args:
        model: the model.
        patterns: regular expressions, searched in parameter names such as
            ``bert.encoder.layer.0.attention.self.query.weight``. The targets are then the weights of linear layers and
            convolutions that any of them hits, also outside the stacks. ``r"attention\."`` takes the attention alone.

    Returns:
        {name: parameter} in the model's order. A weight that several modules share is one target, by its first name.

    Raises:
        ValueError: there is nothing to prune; a pattern is no regular expression, or hits no weight or an embedding; a
            target is not of a floating-point type. The message lists candidates.
    """
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = {m.weight for m in model.modules() if isinstance(m, (*_LINEAR, *_CONVOLUTIONS))} - embeddings
    candidates = {name: parameter for name, parameter in model.named_parameters() if parameter in layers}
    if patterns is None:
        targets = _stacked_linear(model, candidates) or candidates
        if not targets:
            raise ValueError(f"nothing to prune: {type(model).__name__} has no linear layer and no convolution")
    else:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        tables = [name for name, p in model.named_parameters(remove_duplicate=False) if p in embeddings]
        chosen = {name for pattern in patterns for name in _matches(pattern, candidates, tables)}
        targets = {name: weight for name, weight in candidates.items() if name in chosen}
        if not targets:
            raise ValueError("targets is an empty list; name at least one regular expression, or leave it out")
    if wrong := [f"{name} ({weight.dtype})" for name, weight in targets.items() if not weight.is_floating_point()]:
        raise ValueError(
            f"only floating-point weights can be pruned, not {shortened(wrong)}; load without quantization"
        )
    return targets


def _stacked_linear(model: nn.Module, candidates: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the linear layers inside the stacks (module lists) of a Hugging Face model; none of another model."""
    encoder = getattr(model, "base_model", None)
    if not isinstance(encoder, nn.Module):
        return {}
    stacked = {
        module.weight
        for stack in encoder.modules()
        if isinstance(stack, nn.ModuleList)
        for module in stack.modules()
        if isinstance(module, _LINEAR)
    }
    return {name: weight for name, weight in candidates.items() if weight in stacked}


def _matches(pattern: str, candidates: dict[str, nn.Parameter], embeddings: list[str]) -> list[str]:
    """Return the names of the candidates that a pattern hits; it has to hit one, and no embedding."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the target {pattern!r} is no regular expression: {error}") from error
    if tables := [name for name in embeddings if compiled.search(name)]:
        raise ValueError(
            f"the target {pattern!r} hits an embedding ({shortened(tables)}), which is not pruned; narrow it down, "
            f"for example to {re.escape(next(iter(candidates), 'encoder'))!r}"
        )
    found = [name for name in candidates if compiled.search(name)]
    if not found:
        raise ValueError(
            f"the target {pattern!r} hits no weight of a linear layer or convolution; candidates: "
            f"{shortened(candidates, limit=20)}"
        )
    return found
