"""Files of masks: safetensors with one bit for each weight.

It has a uint8 tensor for each parameter, of ceil(numel / 8) bytes: the mask in C order, the first weight in the
highest bit, 1 = keep, and zeros after the last weight. The header holds ``format``, ``version`` and ``shapes`` (JSON).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["MASKS_NAME", "read_masks", "write_masks"]

MASKS_NAME = "masks.safetensors"
_FORMAT, _VERSION = "mfac_hf.masks", "1"


def write_masks(masks: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Write bool masks by parameter name to a file, or as ``masks.safetensors`` into a directory; return the file."""
    file = _file(path)
    shapes = {name: list(keep.shape) for name, keep in masks.items()}
    packed = {name: torch.from_numpy(np.packbits(keep.cpu().numpy())) for name, keep in masks.items()}
    header = {"format": _FORMAT, "version": _VERSION, "shapes": json.dumps(shapes)}
    # A run that is killed while it writes leaves the old file, or the new one, and no half.
    half = file.with_name(file.name + ".tmp")
    save_file(packed, half, metadata=header)
    half.replace(file)
    return file


def read_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what :func:`write_masks` wrote, as bool tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no masks, those of another version, or tensors that are cut off.
    """
    file = _file(path)
    if not file.is_file():
        raise FileNotFoundError(f"no masks at {file}")
    try:
        with safe_open(file, framework="np") as stored:
            header = stored.metadata() or {}
            packed = {name: stored.get_tensor(name) for name in stored.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or a damaged one: {error}") from error
    if (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
        raise ValueError(
            f"{file} has format {header.get('format')!r}, version {header.get('version')!r}; expected {_FORMAT!r}, "
            f"version {_VERSION!r}"
        )
    shapes = {name: torch.Size(shape) for name, shape in json.loads(header["shapes"]).items()}
    sizes = {name: -(-shape.numel() // 8) for name, shape in shapes.items()}
    if {name: bits.nbytes for name, bits in packed.items()} != sizes:
        raise ValueError(f"{file} is damaged: the shapes in its header are not those of its content")
    bits = {n: np.unpackbits(packed[n], count=shape.numel()).astype(bool) for n, shape in shapes.items()}
    return {name: torch.from_numpy(bits[name]).view(shape) for name, shape in shapes.items()}


def _file(path: str | os.PathLike[str]) -> Path:
    return Path(path) / MASKS_NAME if Path(path).is_dir() else Path(path)
