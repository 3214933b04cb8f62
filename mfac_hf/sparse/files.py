"""Sparse models on disk: a small file of the weights, exact to the bit, beside the ordinary one or in its place.

    save_sparse(model, "model-90")              # model.safetensors for everybody, sparse.safetensors, configuration
    weights = load_sparse("user/model-90")      # downloads the small file alone
    model = load_sparse("user/model-90", AutoModelForSequenceClassification)

`mfac_hf.sparse.format` describes the file.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from safetensors import safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

from mfac_hf.sparse.format import DamagedFileError, SparseFile, write_sparse
from mfac_hf.sparse.inference import to_sparse_inference

__all__ = ["SPARSE_FILE", "DamagedFileError", "find_weights", "load_sparse", "save_sparse", "to_sparse_inference"]

SPARSE_FILE = "sparse.safetensors"
DENSE_FILE = "model.safetensors"
DENSE_INDEX = "model.safetensors.index.json"

Model = TypeVar("Model", bound=nn.Module)


def save_sparse(
    model: nn.Module | str | os.PathLike[str], directory: str | os.PathLike[str], *, sparse_only: bool = False
) -> Path:
    """Save a model with each weight tensor in the smallest of three encodings (`mfac_hf.sparse.format`).

    Args:
        model: a model. Or a directory that ``save_pretrained`` wrote, in one file or sharded: then only the sparse
            file is written.
        directory: gets ``sparse.safetensors``, the configuration where the model has one and, unless ``sparse_only``,
            ``model.safetensors``, so that ``from_pretrained`` loads the directory as any other; made if it is missing.
        sparse_only: whether to leave the ordinary file out.

    Returns:
        The path of the sparse file.

    Raises:
        FileNotFoundError: ``model`` is a directory without a model, or without one of its shards.
        ValueError: a tensor cannot be stored, which the message names; or ``sparse_only`` into a directory that holds
            an ordinary file.
    """
    directory = Path(directory)
    path = directory / SPARSE_FILE
    if not isinstance(model, nn.Module):
        tensors = read_tensors(model)
        directory.mkdir(parents=True, exist_ok=True)
        # transformers wrote a tied tensor once, and ties it again when it loads the model
        write_sparse(path, tensors, {})
        return path
    if sparse_only and any(file != path for file in find_weights(directory)):
        raise ValueError(
            f"{directory} already holds {DENSE_FILE}, which from_pretrained would go on loading in place of the "
            "sparse file: remove it or choose another directory"
        )
    state, tied = distinct(model.state_dict())
    directory.mkdir(parents=True, exist_ok=True)
    write_sparse(path, iter(state.items()), tied)
    if sparse_only:
        config: Any = copy.deepcopy(getattr(model, "config", None))
        if hasattr(config, "save_pretrained"):
            config.architectures = [type(model).__name__]  # as the model's own save_pretrained does
            config.save_pretrained(directory)
    elif callable(save_pretrained := getattr(model, "save_pretrained", None)):
        save_pretrained(directory)
    else:
        save_model(model, str(directory / DENSE_FILE))
    return path


def find_weights(directory: str | os.PathLike[str]) -> list[Path]:
    """Find the weight files of a model directory: the sparse one, and the ordinary one or its shards."""
    sparse = Path(directory) / SPARSE_FILE
    try:
        dense = dense_files(directory)
    except FileNotFoundError:
        dense = []
    return [path for path in (sparse, *dense) if path.is_file()]


def dense_files(directory: str | os.PathLike[str]) -> list[Path]:
    """Find the ordinary weight file of a model directory, or its shards.

    Raises:
        FileNotFoundError: the directory holds no model, or the index names a shard that is missing.
    """
    directory = Path(directory)
    if (directory / DENSE_FILE).is_file():
        return [directory / DENSE_FILE]
    index = directory / DENSE_INDEX
    if not index.is_file():
        found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else "no such directory"
        raise FileNotFoundError(
            f"{directory} holds no model: expected {DENSE_FILE}, or {DENSE_INDEX} and its shards, as save_pretrained "
            f"writes them; found: {found}"
        )
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(missing)}")
    return [directory / name for name in names]


def read_tensors(directory: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """Read the ordinary weight files of a directory, one named tensor after the other.

    Raises:
        FileNotFoundError: as from `dense_files`, at the call.
    """
    return _read_shards(dense_files(directory))


def _read_shards(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into its tensors, each once, and the further names of those that have several."""
    first: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        key = (
            (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        )
        if key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor
    return tensors, tied


@overload
def load_sparse(source: str | os.PathLike[str], model: None = None, **hub: Any) -> dict[str, Tensor]: ...
@overload
def load_sparse(source: str | os.PathLike[str], model: Model, **hub: Any) -> Model: ...
@overload
def load_sparse(source: str | os.PathLike[str], model: type, **hub: Any) -> nn.Module: ...


def load_sparse(source: str | os.PathLike[str], model: nn.Module | type | None = None, **hub: Any) -> Any:
    """Load a sparse file tensor by tensor, so that memory never holds more than the dense weights and one tensor.

    Args:
        source: a directory with ``sparse.safetensors``, the file itself, or a name on the Hub, from which only this
            file is downloaded (and ``config.json`` where ``model`` is a class).
        model: None for a state dict; a model to fill, which changes only if everything fits; or a class of
            transformers with ``from_config``, such as ``AutoModelForSequenceClassification``, which builds the model
            from the configuration, in evaluation mode.
        hub: ``revision``, ``token``, ``cache_dir`` and further arguments of ``huggingface_hub.hf_hub_download``.

    Returns:
        A state dict on the CPU in which tied names share one tensor; or the model.

    Raises:
        FileNotFoundError: there is no sparse file.
        DamagedFileError: the file is truncated, altered or of a later version; the message names the tensor.
        ValueError: names, shapes or dtypes are not those of the model, or a class has no ``from_config``.
    """
    file = SparseFile(_locate(source, SPARSE_FILE, hub))
    if model is None:
        weights = {name: file.read(name) for name in file.records}
        return weights | {alias: weights[name] for alias, name in file.tied.items()}
    if isinstance(model, nn.Module):
        for name in file.records:  # before anything changes: a damaged file leaves the model as it was
            file.read(name)
        return _fill(model, file)
    if not hasattr(model, "from_config"):
        raise ValueError(f"{model.__name__} has no from_config: give an Auto class, a model, or None for a state dict")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(_locate(source, "config.json", hub))
    numel = Counter({dtype: 0 for dtype in [torch.get_default_dtype()]})
    for record in file.records.values():
        if record.torch_dtype.is_floating_point:
            numel[record.torch_dtype] += record.numel
    return _fill(model.from_config(config, dtype=numel.most_common(1)[0][0]), file).eval()


def _locate(source: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> Path:
    """Return the path of a file of the source, which is downloaded where the source is a repository."""
    path = Path(source)
    if path.is_file():
        return path if name == SPARSE_FILE else path.with_name(name)
    if path.is_dir():
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} has no {name}; found: {sorted(entry.name for entry in path.iterdir())}")
        return path / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name, **hub))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{source} is neither a file, nor a directory, nor a name on the Hub: {error}"
        ) from error
    except LocalEntryNotFoundError:
        raise  # no network and nothing in the cache, which its message says
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{source} on the Hub has no {name}; from_pretrained loads repositories with an ordinary model.safetensors"
        ) from error


def _fill(model: Model, file: SparseFile) -> Model:
    """Copy the weights of a file into a model that has exactly these."""
    state = model.state_dict()
    _, shared = distinct(state)
    names = {**{name: name for name in file.records}, **file.tied}
    # one name of a tied tensor is enough
    held = {shared.get(name, name) for name in names if name in state}
    missing = [name for name in state if name not in names and shared.get(name, name) not in held]
    unexpected = [name for name in names if name not in state]
    if missing or unexpected:
        raise ValueError(f"{file.path} does not fit the model: it lacks {missing}, and the model lacks {unexpected}")
    for name, source in names.items():
        record, tensor = file.records[source], state[name]
        if record.shape != tuple(tensor.shape) or record.torch_dtype != tensor.dtype:
            raise ValueError(
                f"{name} is {record.dtype} of shape {record.shape} in {file.path}, {tensor.dtype} of shape "
                f"{tuple(tensor.shape)} in the model. Build the model from the configuration beside the file, and "
                "convert its dtype with model.to(...)"
            )
    for source in file.records:
        values = file.read(source)
        for name in (n for n, s in names.items() if s == source):
            state[name].copy_(values)
    return model
