"""The weight files of a model directory, which may come from a stranger."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from mfac_hf.storage import read_json

__all__ = ["DENSE_FILE", "SPARSE_FILE", "check_inside", "dense_files", "find_weights", "read_tensors"]

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
        raise ValueError(f"{index} names files outside of its directory: {outside}; expected plain file names")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(missing)}")
    return [check_inside(directory / name) for name in names]


def check_inside(path: Path) -> Path:
    """Return a file of a directory, which may come from a stranger, unless it is a link to a place elsewhere.

    In the cache of the Hub the files of a snapshot are links to its blobs, which belong to it.

    Raises:
        ValueError: the link leads out of the directory.
    """
    directory, target = path.parent.resolve(), path.resolve()
    blobs = directory.parent.parent / "blobs" if directory.parent.name == "snapshots" else directory
    if not (target.is_relative_to(directory) or target.is_relative_to(blobs)):
        raise ValueError(f"{path} is a link to {target}, outside of its directory: put the file itself there")
    return path


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
