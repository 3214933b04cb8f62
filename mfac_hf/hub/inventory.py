"""Sizes and zeros of a model's weights, tensor by tensor and file by file."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mfac_hf.hub.client import asking_the_hub
from mfac_hf.optim.unwrap import unwrap_model
from mfac_hf.pruning.mask_file import MASKS_NAME, read_masks
from mfac_hf.sparse.directory import SPARSE_FILE, dense_files, find_weights, open_weights
from mfac_hf.sparse.files import distinct, save_sparse

__all__ = ["describe_weights", "file_sizes", "find_model_directory"]

# Buffers, not weights, where the class of the model is not known.
_STATISTICS = re.compile(r"(running_mean|running_var|num_batches_tracked|position_ids|token_type_ids)$")
# `find_model_directory` downloads these and the smallest weight files.
_DESCRIPTIONS = ("config.json", MASKS_NAME)


def describe_weights(model: nn.Module | str | os.PathLike[str]) -> dict[str, Any]:
    """Count the weights and zeros of a model.

    Args:
        model: a model, or a directory that holds one, sparse or dense. Names are those in memory.

    Returns:
        Plain JSON types: ``numel`` and ``zeros`` of all weights; ``targets``, the same for the weights that pruning
        may remove (the names in ``masks.safetensors`` where the directory has one; else those of
        `mfac_hf.pruning.find_targets` where the class of the model is known; else all matrices and convolutions); and
        ``tensors``, the matrices and convolutions, each with ``name``, ``shape``, ``numel``, ``zeros`` and ``target``.

    Raises:
        FileNotFoundError: the directory holds no model.
        ValueError: its configuration describes no model of transformers, or asks for too much.
        DamagedFileError: its sparse file is damaged.
    """
    network: nn.Module | None
    weights: Iterator[tuple[str, Tensor]]
    if isinstance(model, nn.Module):
        network = unwrap_model(model)
        weights = network.named_parameters()
    else:
        network, weights = open_weights(model)
    targets = _targets(model, network)
    first_names = _first_names(network)
    buffers = {name for name, _ in network.named_buffers()} if network is not None else set()
    seen: set[str] = set()
    total, pruned, tensors = {"numel": 0, "zeros": 0}, {"numel": 0, "zeros": 0}, []
    for name, tensor in weights:
        name = first_names.get(name, name)
        if name in seen:  # a file may hold a tied tensor twice
            continue
        seen.add(name)
        if name in buffers or _STATISTICS.search(name) or not tensor.is_floating_point():
            continue
        counts = {"numel": tensor.numel(), "zeros": tensor.numel() - int((tensor != 0).sum())}
        target = tensor.ndim > 1 if targets is None else name in targets
        for key, value in counts.items():
            total[key] += value
            pruned[key] += value if target else 0
        if tensor.ndim > 1:
            tensors.append({"name": name, "shape": list(tensor.shape), **counts, "target": target})
    tensors.sort(key=lambda t: _natural(str(t["name"])))  # files and models have other orders
    return {**total, "targets": pruned, "tensors": tensors}


def _natural(name: str) -> list[Any]:
    """Make a sort key that puts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _first_names(network: nn.Module | None) -> dict[str, str]:
    """Return the first name of each parameter by all that it has."""
    first: dict[nn.Parameter, str] = {}
    named = network.named_parameters(remove_duplicate=False) if network is not None else ()
    return {name: first.setdefault(parameter, name) for name, parameter in named}


def _targets(model: nn.Module | str | os.PathLike[str], network: nn.Module | None) -> set[str] | None:
    """Find the names of the weights that pruning may remove; None where the class of the model is not known."""
    if not isinstance(model, nn.Module) and (Path(model) / MASKS_NAME).is_file():
        return set(read_masks(model))
    if network is None:
        return None
    from mfac_hf.pruning.targets import find_targets

    try:
        return set(find_targets(network))
    except ValueError:  # a model without a linear layer or convolution
        return None


def file_sizes(model: nn.Module | str | os.PathLike[str], sparse: bool) -> dict[str, int]:
    """Return the bytes of each weight file by name.

    Args:
        model: a model, as it would be saved; or a directory that holds one.
        sparse: whether to include the sparse file, as it would be written now.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, nn.Module):
            tensors = distinct(model.state_dict())[0].values()
            sizes = {"model.safetensors": sum(tensor.numel() * tensor.element_size() for tensor in tensors)}
        else:
            try:
                sizes = {path.name: path.stat().st_size for path in dense_files(model)}
            except FileNotFoundError:
                return {SPARSE_FILE: (Path(model) / SPARSE_FILE).stat().st_size}
        if sparse:
            sizes[SPARSE_FILE] = save_sparse(model, folder, sparse_only=True).stat().st_size
    return sizes


def find_model_directory(source: str | os.PathLike[str], **hub: Any) -> Path:
    """Return a directory with the smallest weight files of a model and the files that describe it.

    Args:
        source: a directory; or a name on the Hub, from which the sparse file is downloaded where there is one.
        hub: ``revision``, ``token`` and further arguments of ``huggingface_hub.snapshot_download``.

    Raises:
        FileNotFoundError: ``source`` is neither a directory nor a repository with a model.
        OSError: the Hub is silent, refuses, or answers in another form than its own.
    """
    path = Path(source)
    if path.exists():
        if not find_weights(path):
            dense_files(path)  # says what it expected
        return path
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        with asking_the_hub(str(source)):
            files = HfApi().list_repo_files(str(source), **{k: hub[k] for k in ("revision", "token") if k in hub})
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"{source} is no directory and no repository that can be read: {error}") from error
    weights = (
        [SPARSE_FILE] if SPARSE_FILE in files else [f for f in files if re.match(r"model.*\.(safetensors|json)$", f)]
    )
    if not weights:
        raise FileNotFoundError(f"{source} on the Hub holds no safetensors weights; it has: {', '.join(files)}")
    with asking_the_hub(str(source)):
        return Path(snapshot_download(str(source), allow_patterns=[*weights, *_DESCRIPTIONS], **hub))
