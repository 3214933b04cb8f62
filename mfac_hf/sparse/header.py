"""The header of a sparse file, checked before anything that it describes is read.

`mfac_hf.sparse.format` describes the file. A header comes from whoever wrote the file: types, sizes and names are
checked here, and a tensor that would take far more memory than the file is refused before it takes any.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["DamagedFileError", "Header", "TensorRecord", "fits_file", "header_text", "parse_header"]

VERSION = 1
PARTS = {"dense": ("values",), "bitmask": ("mask", "values"), "csr": ("counts", "columns", "values")}
# By bytes of a value: the integers that carry its bits.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Tensors take at most so many times the bytes of their file (rows of 4096 of which one weight in a thousand is kept
# reach 600); so many are granted to every file, and to every tensor when it is encoded.
MOST_TIMES_SMALLER = 1000
GRANTED_TO_FILE = 64 << 20
GRANTED_TO_TENSOR = 64 << 10
# Numbers of weights and of their bytes are signed 64-bit integers in torch and NumPy.
_MOST = 2**63 - 1


class DamagedFileError(ValueError):
    """A sparse file that is truncated, altered, inconsistent or of a later version."""


@dataclass(frozen=True)
class TensorRecord:
    """What the header says about one tensor."""

    encoding: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that the header names."""
        return getattr(torch, self.dtype)

    @property
    def numel(self) -> int:
        """Number of weights, with the zeros."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.numel * self.torch_dtype.itemsize

    @property
    def rows_and_columns(self) -> tuple[int, int]:
        """The matrix that csr indexes."""
        return rows_and_columns(self.shape)


@dataclass(frozen=True)
class Header:
    """Records by name, and further names of these tensors."""

    records: dict[str, TensorRecord]
    tied: dict[str, str]


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the matrix as which csr sees a tensor: its first dimension, and the others flattened."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def fits_file(dense_bytes: int, file_bytes: int, granted: int) -> bool:
    """Whether a file of this size may hold tensors of that size."""
    return dense_bytes <= max(granted, MOST_TIMES_SMALLER * file_bytes)


def header_text(records: Mapping[str, TensorRecord], tied: Mapping[str, str]) -> str:
    """Write a header, with its checksum."""
    header = {"version": VERSION, "tensors": {name: vars(r) for name, r in records.items()}, "tied": dict(tied)}
    return _json({**header, "sha256": _digest(header)})


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(_json(header).encode()).hexdigest()


def parse_header(text: str, path: Path) -> Header:
    """Read a header.

    Args:
        text: the header.
        path: its file, whose size bounds that of the tensors.

    Raises:
        DamagedFileError: it is not one, its checksum does not fit, a later version wrote it, or its tensors would take
            more than 1000 times the memory of the file.
    """
    try:
        header = json.loads(text)
        version, sha256 = header["version"], header.pop("sha256")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"the header of {path} is damaged: {error!r}. Copy or download it again") from error
    if isinstance(version, int) and version > VERSION:
        raise DamagedFileError(
            f"{path} has version {version} of the format; this mfac_hf reads versions up to {VERSION}. "
            "Install a newer one: pip install --upgrade mfac_hf"
        )
    if _digest(header) != sha256:
        raise DamagedFileError(f"the header of {path} does not match its checksum. Copy or download it again")
    tensors, tied = header.get("tensors"), header.get("tied")
    if not isinstance(tensors, dict) or not isinstance(tied, dict):
        raise DamagedFileError(f"the header of {path} makes no sense: it has {sorted(header)}, with tensors and tied")
    records = {name: _record(path, name, entry) for name, entry in tensors.items()}
    if stray := {a: b for a, b in tied.items() if a in records or not isinstance(b, str) or b not in records}:
        raise DamagedFileError(f"{path} ties names that do not fit its tensors: {stray}")
    _check_size(path, records)
    return Header(records, tied)


def _record(path: Path, name: str, entry: Any) -> TensorRecord:
    """Check and convert an entry of the header."""
    try:
        record = TensorRecord(entry["encoding"], entry["dtype"], tuple(entry["shape"]), entry["sha256"])
    except (TypeError, KeyError) as error:
        raise DamagedFileError(f"{name} in {path}: its entry in the header makes no sense: {entry!r:.200}") from error
    dtype = getattr(torch, record.dtype, None) if isinstance(record.dtype, str) else None
    if (
        not (isinstance(record.encoding, str) and record.encoding in PARTS)
        or not (isinstance(dtype, torch.dtype) and dtype.itemsize in BITS)
        or not all(type(length) is int and length >= 0 for length in record.shape)
        or not isinstance(record.sha256, str)
    ):
        raise DamagedFileError(f"{name} in {path}: its entry in the header makes no sense: {entry!r:.200}")
    # Of an empty tensor too: torch multiplies the lengths before it meets the zero.
    if math.prod(length or 1 for length in record.shape) * dtype.itemsize > _MOST:
        raise DamagedFileError(
            f"{name} in {path} overflows: shape {record.shape} of {record.dtype} is more than 2**63 - 1 bytes"
        )
    return record


def _check_size(path: Path, records: dict[str, TensorRecord]) -> None:
    """Refuse tensors that the file is too small for."""
    total, size = sum(record.nbytes for record in records.values()), path.stat().st_size
    if not fits_file(total, size, GRANTED_TO_FILE):
        name = max(records, key=lambda name: records[name].nbytes)
        raise DamagedFileError(
            f"{path} has {size} bytes and says that its tensors take {total} ({name} alone {records[name].nbytes}, of "
            f"shape {records[name].shape}); expected at most {MOST_TIMES_SMALLER} times its size, or "
            f"{GRANTED_TO_FILE >> 20} MiB"
        )
