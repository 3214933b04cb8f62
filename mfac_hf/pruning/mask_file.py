"""Files of masks: safetensors with one bit for each weight.

It has a uint8 tensor for each parameter, of ceil(numel / 8) bytes: the mask in C order, the first weight in the
highest bit, 1 = keep, and zeros after the last weight. The header holds ``format``, ``version``, ``shapes`` (JSON) and
``sha256``, the checksum of names, shapes and bits. Files from before the checksum are read without one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mfac_hf.storage import save_safetensors

__all__ = ["MASKS_NAME", "read_masks", "write_masks"]

logger = logging.getLogger(__name__)

MASKS_NAME = "masks.safetensors"
_FORMAT, _VERSION = "mfac_hf.masks", "1"


def write_masks(masks: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Write bool masks by parameter name to a file, or as ``masks.safetensors`` into a directory; return the file.

    Raises:
        OSError: the file cannot be written; what was there before stays.
    """
    file = _file(path)
    shapes = {name: list(keep.shape) for name, keep in masks.items()}
    packed = {name: np.packbits(keep.cpu().numpy()) for name, keep in masks.items()}
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "shapes": json.dumps(shapes),
        "sha256": _checksum(shapes, packed),
    }
    save_safetensors(file, {name: torch.from_numpy(bits) for name, bits in packed.items()}, header)
    return file


def read_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what :func:`write_masks` wrote, as bool tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no masks, those of another version, or masks that were damaged; the message names it.
    """
    file = _file(path)
    if not file.is_file():
        raise FileNotFoundError(f"no masks at {file}")
    try:
        with safe_open(file, framework="np") as stored:
            header, dtypes = stored.metadata() or {}, {stored.get_slice(name).get_dtype() for name in stored.keys()}
            if (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
                raise _Malformed(
                    f"has format {header.get('format')!r}, version {header.get('version')!r}; expected {_FORMAT!r}, "
                    f"version {_VERSION!r}"
                )
            if dtypes != {"U8"}:
                raise _Malformed(
                    f"has tensors of {sorted(dtypes) or 'no dtype'}; expected U8, eight weights in a byte"
                )
            packed = {name: stored.get_tensor(name) for name in stored.keys()}
        shapes = _parse_shapes(header.get("shapes"), packed)
        checksum = header.get("sha256")
        if checksum is not None and checksum != _checksum(shapes, packed):
            raise _Malformed("is damaged: its checksum is not that of its content; take another copy")
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or a damaged one: {error}") from error
    except _Malformed as error:
        raise ValueError(f"{file} {error}") from error
    if checksum is None:
        logger.warning("%s has no checksum, as files of earlier versions; its masks are taken as they are", file)
    bits = {n: np.unpackbits(packed[n], count=math.prod(shape)).astype(bool) for n, shape in shapes.items()}
    return {name: torch.from_numpy(bits[name]).view(shape) for name, shape in shapes.items()}


class _Malformed(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its name."""


def _parse_shapes(text: str | None, packed: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """Return the shapes of the header; they have to be those of the content, with zeros after the last weight."""
    try:
        shapes = json.loads(text or "null")
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"has shapes in its header that are no JSON: {error}") from error
    if not isinstance(shapes, dict) or not all(_is_shape(shape) for shape in shapes.values()):
        raise _Malformed("has other than shapes by name in its header: expected lists of whole numbers")
    sizes = {name: (-(-math.prod(shape) // 8),) for name, shape in shapes.items()}
    if sizes != {name: bits.shape for name, bits in packed.items()}:
        raise _Malformed("is damaged: the shapes in its header are not those of its content")
    for name, bits in packed.items():
        if bits[-1:].any() and int(bits[-1]) & ((1 << -math.prod(shapes[name]) % 8) - 1):
            raise _Malformed(f"is damaged: bits are set after the last weight of {name}")
    return shapes


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(size) is int and 0 <= size < 1 << 62 for size in value)
    )


def _checksum(shapes: Mapping[str, list[int]], packed: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of names, shapes and bits, in the order of the names."""
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode())
    for name in sorted(packed):
        digest.update(packed[name].data)
    return digest.hexdigest()


def _file(path: str | os.PathLike[str]) -> Path:
    return Path(path) / MASKS_NAME if Path(path).is_dir() else Path(path)
