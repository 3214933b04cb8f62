r"""Published checkpoints: from files to state dicts of our models.

`read_checkpoint` takes ``.pth``, ``.pth.tar``, ``.th`` (pickles, read with ``weights_only=True``: tensors and plain
values, never code; their checksums are compared, where they have any) and ``.safetensors``. The weights may lie at the
top or under ``state_dict`` or ``model``, with or without the prefix ``module.``, with or without a pruning ``mask``
beside them.

Checkpoints in the naming of the STR repository (Kusupati et al. 2020), such as the sparse MobileNetV1 and ResNet-50 of
the M-FAC paper, are converted by `load_weights`:

====================================  ============================================================================
STR                                   here
====================================  ============================================================================
``fc.weight`` (classes, width, 1, 1)  ``fc.weight`` (classes, width): there the classifier is a 1 x 1 convolution
no ``fc.bias``                        zeros
``X.sparseThreshold`` s               none: ``X.weight`` becomes :math:`\mathrm{sign}(w)\,\max(|w| - \sigma(s), 0)`,
                                      which is what STR multiplies with
====================================  ============================================================================

and, for ResNet-50, whose model here is the one of `transformers`:

====================================  ============================================================================
STR and torchvision                   ``transformers.ResNetForImageClassification``
====================================  ============================================================================
``conv1``, ``bn1``                    ``resnet.embedder.embedder.convolution``, ``.normalization``
``layerI.J.convK``, ``layerI.J.bnK``  ``resnet.encoder.stages.I-1.layers.J.layer.K-1.convolution``, ``.normalization``
``layerI.J.downsample.0``, ``.1``     ``resnet.encoder.stages.I-1.layers.J.shortcut.convolution``, ``.normalization``
``fc``                                ``classifier.1``
====================================  ============================================================================
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mfac_hf.storage import load_tensors

__all__ = ["Checkpoint", "load_weights", "read_checkpoint"]


_BESIDE = ("mask", "normalization")  # what may stand beside the weights

# By SHA-256 of the first convolution, which is the same in every form of a checkpoint. The first is the ResNet-20 of
# the M-FAC paper: 90.7 % of 1,000 test images are right with mean and deviation 0.5, and 74.2 % with the statistics of
# CIFAR-10, which that paper's data loader uses. The others are resnet20, 32, 44 and 56 of
# akamaster/pytorch_resnet_cifar10, as its trainer has it.
_KNOWN_NORMALIZATIONS = {
    "a12210b7101fac53": "half",
    "dd58fff310126506": "imagenet",
    "b7fcc6061201fcb9": "imagenet",
    "b6136bfe8df9cc39": "imagenet",
    "2c839b9bbbcddce3": "imagenet",
}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        weights: state dict, without ``module.``.
        mask: pruning mask, True = keep: {name: bool tensor}, or one flat bool tensor over all pruned weights in the
            model's order, as the reference writes it; None if there is none.
        normalization: normalisation that the weights were trained with, by its name in
            `mfac_hf.tasks.vision_preprocess.NORMALIZATIONS`; None where neither the file nor its weights tell it.
    """

    weights: dict[str, Tensor]
    mask: dict[str, Tensor] | Tensor | None = None
    normalization: str | None = None


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint file of one of the formats that the module's docstring names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is corrupt, holds pickled code, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} is no file")
    content: Any = _read(path)
    mask, normalization = (content.get(key) if isinstance(content, Mapping) else None for key in _BESIDE)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"checkpoint {path} holds {_describe(content)}; expected a state dict of tensors")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"checkpoint {path} holds {type(value).__name__} at {key!r}; expected a state dict of tensors, at the "
                "top or under 'state_dict' or 'model'"
            )
    weights = {key.removeprefix("module."): value for key, value in content.items()}
    known = _KNOWN_NORMALIZATIONS.get(_first_weights(weights))
    return Checkpoint(weights, _check_mask(path, mask), normalization if isinstance(normalization, str) else known)


def _read(path: Path) -> Any:
    damaged = f"checkpoint {path} cannot be read: the file is damaged or no checkpoint"
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{damaged} ({error})") from error
    try:
        return load_tensors(path)
    except ValueError as error:
        reason = error.__cause__
        code = re.search(r"(?:GLOBAL|global|class|function) ([\w.]*\.[\w.]+)", str(reason))
        if code is None or not isinstance(reason, pickle.UnpicklingError):
            raise ValueError(f"{damaged} ({str(reason).splitlines()[0]})" if str(reason) else damaged) from error
        raise ValueError(
            f"checkpoint {path} is refused: it holds pickled code ({code[1]}), which reading would run. Save its "
            "tensors alone, best as .safetensors"
        ) from error


def _first_weights(weights: Mapping[str, Tensor]) -> str:
    first = weights.get("conv1.weight", torch.empty(0)).detach().to(torch.float32).contiguous()
    return hashlib.sha256(first.numpy().tobytes()).hexdigest()[:16]


def _describe(content: Any) -> str:
    return "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"


def _check_mask(path: Path, mask: Any) -> dict[str, Tensor] | Tensor | None:
    if mask is None:
        return None
    tensors = list(mask.values()) if isinstance(mask, Mapping) else [mask]
    if not all(isinstance(t, Tensor) and t.dtype == torch.bool for t in tensors):
        raise ValueError(f"checkpoint {path} has a 'mask' that is no bool tensor (True = keep), nor a dict of such")
    return {key.removeprefix("module."): t for key, t in mask.items()} if isinstance(mask, Mapping) else mask


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str = "the checkpoint") -> None:
    """Load a state dict into a model, converted as the module's docstring says.

    Counters that old checkpoints lack (``num_batches_tracked``) stay as they are.

    Args:
        model: the model; unchanged where this raises.
        weights: state dict, as `read_checkpoint` returns it.
        source: what an error calls the state dict.

    Raises:
        ValueError: the state dict is another model's; names the first missing, unexpected and misshapen keys.
    """
    own = model.state_dict()
    weights = _convert(weights, own)
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in own]
    misshapen = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    faults = []
    if missing:
        faults.append(f"{len(missing)} keys are missing, first {missing[0]!r}")
    if unexpected:
        faults.append(f"{len(unexpected)} are unexpected, first {unexpected[0]!r}")
    if misshapen:
        key = misshapen[0]
        faults.append(
            f"{len(misshapen)} have another shape, first {key!r}: {tuple(weights[key].shape)} in the checkpoint, "
            f"{tuple(own[key].shape)} in the model"
        )
    if faults:
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: {'; '.join(faults)}. Choose the model that it belongs to"
        )
    model.load_state_dict({**own, **weights})


def _convert(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under our models' names; one that has them already stays as it is."""
    converted = dict(weights)
    for key in [key for key in converted if key.endswith(".sparseThreshold")]:
        name = key.removesuffix("sparseThreshold") + "weight"
        if name in converted:
            weight, threshold = converted[name], torch.sigmoid(converted.pop(key))
            converted[name] = weight.sign() * (weight.abs() - threshold).clamp(min=0)
    head = converted.get("fc.weight")
    if head is not None and head.ndim == 4 and head.shape[2:] == (1, 1):
        converted["fc.weight"] = head.flatten(1)
        converted.setdefault("fc.bias", torch.zeros(len(head), dtype=head.dtype))
    if "resnet.embedder.embedder.convolution.weight" in own:
        converted = {_transformers_name(key): value for key, value in converted.items()}
    return converted


def _transformers_name(key: str) -> str:
    """Name in `transformers` of a key in the naming of STR and torchvision; other keys unchanged."""
    if match := re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn)(\d)\.(\w+)", key):
        stage, block, kind, index, leaf = match.groups()
        kind = "convolution" if kind == "conv" else "normalization"
        return f"resnet.encoder.stages.{int(stage) - 1}.layers.{block}.layer.{int(index) - 1}.{kind}.{leaf}"
    if match := re.fullmatch(r"layer(\d)\.(\d+)\.downsample\.([01])\.(\w+)", key):
        stage, block, kind, leaf = match.groups()
        kind = "convolution" if kind == "0" else "normalization"
        return f"resnet.encoder.stages.{int(stage) - 1}.layers.{block}.shortcut.{kind}.{leaf}"
    for name, ours in {
        "conv1.": "resnet.embedder.embedder.convolution.",
        "bn1.": "resnet.embedder.embedder.normalization.",
        "fc.": "classifier.1.",
    }.items():
        if key.startswith(name):
            return ours + key.removeprefix(name)
    return key
