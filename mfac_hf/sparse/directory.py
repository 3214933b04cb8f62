"""The weight files of a model directory, which may come from a stranger."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mfac_hf.optim.unwrap import unwrap_model
from mfac_hf.pruning.masks import shortened
from mfac_hf.sparse.format import SparseFile
from mfac_hf.sparse.names import tensors_in_memory
from mfac_hf.sparse.skeleton import build_skeleton
from mfac_hf.storage import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "DENSE_FILE",
    "SPARSE_FILE",
    "check_inside",
    "dense_files",
    "find_weights",
    "open_weights",
    "read_tensors",
    "restore_weights",
]

SPARSE_FILE = "sparse.safetensors"
DENSE_FILE = "model.safetensors"
DENSE_INDEX = "model.safetensors.index.json"


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
        ValueError: the index is none, or names files elsewhere; or a file is a link that leads elsewhere.
    """
    directory = Path(directory)
    if (directory / DENSE_FILE).is_file():
        return [check_inside(directory / DENSE_FILE)]
    index = directory / DENSE_INDEX
    if not index.is_file():
        found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else "no such directory"
        if "adapter_config.json" in found:
            raise FileNotFoundError(
                f"{directory} holds a PEFT adapter and no model: merge it into its base model with merge_and_unload() "
                "and save that"
            )
        raise FileNotFoundError(
            f"{directory} holds no model: expected {DENSE_FILE}, or {DENSE_INDEX} and its shards, as save_pretrained "
            f"writes them; found: {found}"
        )
    shards = read_json(index)
    shards = shards.get("weight_map") if isinstance(shards, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} is no index of shards: expected a weight_map from names of tensors to files")
    names = sorted(set(shards.values()))
    if outside := [name for name in names if name in ("", ".", "..") or set(name) & set("/\\\0:")]:
        raise ValueError(
            f"{index} names files outside of its directory: {shortened(outside)}; expected plain file names"
        )
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{index} names shards that are not there: {shortened(missing)}")
    return [check_inside(directory / name) for name in names]


def check_inside(path: Path, directory: str | os.PathLike[str] | None = None) -> Path:
    """Return a file of a directory, which may come from a stranger, unless it is a link to a place elsewhere.

    In the cache of the Hub the files of a snapshot are links to its blobs, which belong to it.

    Args:
        path: the file.
        directory: the directory; None for the one in which the file lies.

    Raises:
        ValueError: the link leads out of the directory.
    """
    folder, target = Path(directory or path.parent).resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not (target.is_relative_to(folder) or target.is_relative_to(blobs)):
        raise ValueError(f"{path} is a link to {target}, outside of its directory: put the file itself there")
    return path


def read_tensors(directory: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """Read the ordinary weight files of a directory, one tensor after the other, under its name in memory.

    Raises:
        FileNotFoundError: as from `dense_files`, at the call.
        ValueError: as from `dense_files`, or from `build_skeleton` for a configuration that describes no model; a
            weight file is damaged.
    """
    return _read_dense(dense_files(directory), directory)[1]


def open_weights(
    directory: str | os.PathLike[str],
) -> tuple[PreTrainedModel | None, Iterator[tuple[str, Tensor]]]:
    """Read the weights of a directory: the ordinary ones, or the sparse file where it has that alone.

    Returns:
        The model without weights (None where its class is not known), and names in memory with tensors.

    Raises:
        FileNotFoundError: the directory holds no model.
        ValueError: as from `read_tensors`.
        DamagedFileError: the sparse file is damaged.
    """
    if find_weights(directory) != [Path(directory) / SPARSE_FILE]:
        return _read_dense(dense_files(directory), directory)  # a sparse file beside them may be older
    file = SparseFile(Path(directory) / SPARSE_FILE)
    model = build_skeleton(directory, len(file.records))
    if model is None or file.records.keys() <= model.state_dict().keys():
        return model, ((name, file.read(name)) for name in file.records)
    return model, tensors_in_memory(model, file.records, file.read)


@torch.no_grad()
def restore_weights(model: nn.Module, directory: str | os.PathLike[str]) -> bool:
    """Copy the weights of a directory into a model whose names in memory are not those on disk.

    Trainer resumes such a model (ViT, Mixtral) by the names on disk, and leaves out every weight that has another one.

    Args:
        model: the model that was saved there, possibly wrapped.
        directory: a checkpoint of Trainer.

    Returns:
        Whether anything was copied. A model that has the names on disk, or an ordinary file of which there is none
        here, is left alone.

    Raises:
        ValueError: the weights there are those of another model; nothing was copied.
    """
    from transformers import PreTrainedModel

    model = unwrap_model(model)
    dense = [path for path in find_weights(directory) if path.name != SPARSE_FILE]
    if not isinstance(model, PreTrainedModel) or not dense:
        return False
    files = _names_of(dense)
    state = model.state_dict()
    if files.keys() <= state.keys():
        return False
    weights = dict(_read_shards(model, files))
    wrong = [name for name, tensor in weights.items() if name not in state or state[name].shape != tensor.shape]
    if wrong:
        kind = type(model).__name__
        raise ValueError(f"the weights in {directory} are not those of this {kind}: {shortened(wrong)}")
    for name, tensor in weights.items():
        state[name].copy_(tensor)
    return True


def _read_dense(
    paths: list[Path], directory: str | os.PathLike[str]
) -> tuple[PreTrainedModel | None, Iterator[tuple[str, Tensor]]]:
    """Read weight files as `open_weights` does."""
    files = _names_of(paths)
    model = build_skeleton(directory, len(files))
    return model, _read_shards(model, files)


def _names_of(paths: list[Path]) -> dict[str, Path]:
    """Return the file of each tensor by its name on disk."""
    files: dict[str, Path] = {}
    for path in paths:
        with _opened(path) as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def _read_shards(model: PreTrainedModel | None, files: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    with ExitStack() as stack:
        opened = {path: stack.enter_context(_opened(path)) for path in dict.fromkeys(files.values())}

        def read(name: str) -> Tensor:
            return opened[files[name]].get_tensor(name)

        if model is None:
            yield from ((name, read(name)) for name in files)
        else:
            yield from tensors_in_memory(model, files, read)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}. Copy or download it again") from error
