"""Targets: the weights of a model that pruning may touch."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from mfac_hf.optim.unwrap import unwrap_model
from mfac_hf.pruning.experts import expert_weights, router_weights
from mfac_hf.pruning.masks import shortened

__all__ = ["find_targets", "folded", "grouped", "left_out"]

logger = logging.getLogger(__name__)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LINEAR = (nn.Linear, Conv1D)
_BIAS = re.compile(r"(^|[._])bias(_|$)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\bexpert_)\d+(?=\.)")
_OWN = "of no linear layer"


def find_targets(model: nn.Module, patterns: Sequence[str] | str | None = None) -> dict[str, nn.Parameter]:
    r"""Choose the weights to prune.

    By default the targets of a Hugging Face transformer (an encoder, a decoder, both, for text or images), also inside
    another module, are the linear layers and the experts inside its stacks of layers: attention and feed-forward, but
    no embeddings, normalisation, biases, pooler, task head or language-model head, and no router of a mixture of
    experts. Those of any other model (a convolutional network) are the weights of all convolutions and linear layers,
    with the classifier. A log line names the targets and what is left out (:func:`left_out`); a warning names the
    matrices of the stacks that belong to no linear layer.

    The weights of the experts of a layer are one target of three dimensions, pruned as the matrices that it consists
    of (`mfac_hf.pruning.experts`). The factors of PEFT's adapters are no targets; the layers that they adapt are.

    Args:
        model: the model; inside torch.compile, DistributedDataParallel or DataParallel, what they wrap.
        patterns: regular expressions, searched in parameter names such as
            ``bert.encoder.layer.0.attention.self.query.weight``. The targets are then the weights of linear layers,
            convolutions and experts that any of them hits, also outside the stacks, routers too. ``r"attention\."``
            takes the attention alone.

    Returns:
        {name: parameter} in the model's order. A weight that several modules share is one target, by its first name.

    Raises:
        ValueError: there is nothing to prune; a pattern is no regular expression, or hits no weight or an embedding; a
            target is not of a floating-point type, or no plain parameter: it is computed from others in each forward
            pass, spread over ranks, or merged with an adapter. The message lists candidates, or what there is.
    """
    model = unwrap_model(model)
    kinds = _kinds(model)
    layers: set[Tensor] = {m.weight for m in model.modules() if isinstance(m, (*_LINEAR, *_CONVOLUTIONS))}
    layers |= set(expert_weights(model))
    candidates = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter in layers and kinds[parameter] not in ("embedding", "adapter")
    }
    computed = _computed_weights(model)
    if patterns is None:
        stacks = _stacks(model)
        inside = {f"{name}.weight" for name, module in model.named_modules() if module in stacks}
        _refuse_computed({name: why for name, why in computed.items() if not stacks or name in inside})
        targets = {name: weight for name, weight in candidates.items() if kinds[weight] in ("linear layer", "experts")}
        if not stacks or (not targets and "convolution" in kinds.values()):
            targets = candidates
        others = left_out(model, targets)
        if not targets:
            where = "in its stacks of layers" if stacks else "at all"
            raise ValueError(
                f"nothing to prune: {type(model).__name__} has no linear layer and no convolution {where}, but "
                f"{grouped(others)}; name targets by regular expressions"
            )
        _tell(model, targets, others)
    else:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        named = model.named_parameters(remove_duplicate=False)
        tables = [name for name, parameter in named if kinds[parameter] == "embedding"]
        chosen = {name for pattern in patterns for name in _matches(pattern, [*candidates, *computed], tables)}
        _refuse_computed({name: why for name, why in computed.items() if name in chosen})
        targets = {name: weight for name, weight in candidates.items() if name in chosen}
        if not targets:
            raise ValueError("targets is an empty list; name at least one regular expression, or leave it out")
    if wrong := [f"{name} ({weight.dtype})" for name, weight in targets.items() if not weight.is_floating_point()]:
        raise ValueError(
            f"only floating-point weights can be pruned, not {shortened(wrong)}; load without quantization"
        )
    if wrong := [f"{name} ({type(p).__name__})" for name, p in targets.items() if type(p) is not nn.Parameter]:
        raise ValueError(
            f"only plain parameters can be pruned, not {shortened(wrong)}; gather a model that is spread over ranks, "
            "load a quantized one without quantization, and run a lazy one once"
        )
    return targets


def left_out(model: nn.Module, targets: Collection[str]) -> dict[str, str]:
    """Say what each matrix of a model that is no target is.

    Args:
        model: the model.
        targets: names of the targets.

    Returns:
        {name: kind} of the parameters of two or more dimensions: ``"embedding"``, ``"router"``, ``"outside of the
        stacks"`` (of layers: heads, poolers), ``"bias"``, ``"convolution"``, ``"adapter"``, ``"of no linear layer"``,
        and what patterns leave out, ``"linear layer"`` and ``"experts"``. A weight that several modules share has the
        first of its names, and the kind tells the others.
    """
    model = unwrap_model(model)
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    others = {}
    for weight, kind in _kinds(model).items():
        first, *more = names[weight]
        if first not in targets and weight.ndim >= 2:
            others[first] = f"{kind}, tied to {shortened(more)}" if more else kind
    return others


def _kinds(model: nn.Module) -> dict[Tensor, str]:
    """Say of each parameter of a model what it is; a model without stacks counts as one."""
    stacks = _stacks(model) or set(model.modules())
    kinds: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters():
        kinds[parameter] = "bias" if _BIAS.search(name.rpartition(".")[2]) else _OWN

    def mark(kind: str, weights: Iterable[Any]) -> None:
        kinds.update((weight, kind) for weight in weights if weight in kinds)  # others are computed in each pass

    inside = {parameter for module in stacks for parameter in module.parameters(recurse=False)}
    mark("convolution", (m.weight for m in stacks if isinstance(m, _CONVOLUTIONS)))
    mark("linear layer", (m.weight for m in stacks if isinstance(m, _LINEAR)))
    mark("experts", expert_weights(model))
    mark("router", router_weights(model))
    mark("outside of the stacks", kinds.keys() - inside)
    mark("adapter", _adapter_parameters(model))
    mark("embedding", (m.weight for m in model.modules() if isinstance(m, nn.Embedding)))
    return kinds


def _stacks(model: nn.Module) -> set[nn.Module]:
    """Return the modules inside the stacks (module lists) of the Hugging Face transformers in a model."""
    return {
        module
        for transformer in _transformers(model)
        for stack in transformer.modules()
        if isinstance(stack, nn.ModuleList) and not isinstance(stack, parametrize.ParametrizationList)
        for module in stack.modules()
    }


def _transformers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the transformers without their heads: that of the model itself, or else those of the modules inside it."""
    adapted: Any = getattr(model, "get_base_model", None)  # of a PeftModel
    base = getattr(model if adapted is None else adapted(), "base_model", None)
    if isinstance(base, nn.Module):
        yield base
    else:
        for child in model.children():
            yield from _transformers(child)


def _adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that PEFT added to layers, and the layers that it keeps beside copies of its own.

    Raises:
        ValueError: adapters are merged into the layers, and will be subtracted from them again.
    """
    for name, module in model.named_modules():
        names = getattr(type(module), "adapter_layer_names", ())  # of PEFT's layers alone
        if names and getattr(module, "merged", False) is True:
            raise ValueError(
                f"the adapters of {name} are merged into its weight, which changes when they are taken out: call "
                "unmerge_adapter() to prune the layers below, or merge_and_unload() to prune what they are together"
            )
        parts = [getattr(module, part, None) for part in names]
        if "modules_to_save" in module._modules:
            parts.append(module._modules.get("original_module"))
        for part in parts:
            if isinstance(part, nn.Module):
                yield from part.parameters()


def _computed_weights(model: nn.Module) -> dict[str, str]:
    """Return the matrices that stand where a layer has its weight, but are no parameters, and the class of the layer.

    torch.nn.utils.prune, weight_norm and other reparametrisations compute a weight from other parameters.
    """
    computed = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        plain = isinstance(weight, nn.Module | nn.Parameter) and not parametrize.is_parametrized(module, "weight")
        if not plain and (callable(weight) or (isinstance(weight, Tensor) and weight.ndim >= 2)):
            computed[f"{name}.weight" if name else "weight"] = type(module).__name__
    return computed


def _refuse_computed(computed: dict[str, str]) -> None:
    if computed:
        found = shortened(f"{name} ({layer})" for name, layer in computed.items())
        raise ValueError(
            f"computed by their layers, and so no parameters: {found}. Make that permanent first, with "
            "torch.nn.utils.prune.remove or parametrize.remove_parametrizations; prune before to_sparse_inference and "
            "before quantization; or name other targets"
        )


def _tell(model: nn.Module, targets: Collection[str], others: Mapping[str, str]) -> None:
    """Log what is pruned and what is not, and warn of matrices of own kinds in the stacks."""
    logger.info("to be pruned: %s. Left out: %s", ", ".join(folded(targets)), grouped(others))
    own = [name for name, kind in others.items() if kind == _OWN and _is_matrix(model.get_parameter(name))]
    if own:
        logger.warning(
            "left out of the targets, as they belong to no linear layer: %s", shortened(folded(own), limit=20)
        )


def _is_matrix(parameter: Tensor) -> bool:
    """Return whether a parameter has rows and columns; tables of positions, (1, n, d), are no matrices."""
    return parameter.shape[0] > 1 and sum(size > 1 for size in parameter.shape) >= 2


def folded(names: Iterable[str]) -> list[str]:
    """Put names that differ in the numbers of their layers and experts alone into one, with a count."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_NUMBER.sub("*", name), []).append(name)
    return [found[0] if len(found) == 1 else f"{name} ({len(found)})" for name, found in alike.items()]


def grouped(kinds: Mapping[str, str]) -> str:
    """Write names by kind, for a message."""
    by_kind: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        by_kind.setdefault(kind, []).append(name)
    parts = [f"{', '.join(folded(names))} ({kind})" for kind, names in by_kind.items()]
    return "; ".join(parts) or "no matrix at all"


def _matches(pattern: str, candidates: Sequence[str], embeddings: list[str]) -> list[str]:
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
            f"the target {pattern!r} hits no weight of a linear layer, convolution or expert; candidates: "
            f"{shortened(candidates, limit=20)}"
        )
    return found
