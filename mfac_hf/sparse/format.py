"""A file format for sparse weights: one safetensors file in which each tensor takes the smallest of three encodings.

    dense    NAME/values    the tensor as it is
    bitmask  NAME/mask      one bit a weight, row-major, lowest bit first, in bytes
             NAME/values    the weights whose bit is set
    csr      NAME/counts    how many weights each row keeps (a row: all dimensions but the first, flattened)
             NAME/columns   their columns, ascending within a row
             NAME/values    their values

Counts are unsigned integers of as few bytes as hold the length of a row, columns of as few as hold the last column.
NaN payloads come back as they were. Zeros of either sign are left out of bitmask and csr and come back as +0.0: half
the zeros of a model that was multiplied by masks are -0.0, and to keep their signs would take a bit for each. A dense
tensor comes back to the bit.

The dense tensors take at most 1000 times the bytes of the file (or 64 MiB), which a reader checks before it takes
memory for them. So csr is not for tensors of more than 64 KiB that it would make more than 1000 times smaller.

The safetensors metadata has one entry, ``mfac_sparse``, a JSON object: ``version`` (1); ``tensors``, for each name its
``encoding``, ``dtype``, ``shape`` and ``sha256`` over the bytes of its parts in the order above; ``tied``, further
names of a tensor; and ``sha256`` over the same object without this entry, as JSON without spaces, keys in the file's
order. Any safetensors library reads the parts, and this page says all that is needed to put them together. The same
weights give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mfac_hf.sparse.header import (
    BITS,
    GRANTED_TO_TENSOR,
    PARTS,
    DamagedFileError,
    TensorRecord,
    fits_file,
    header_text,
    parse_header,
    rows_and_columns,
)
from mfac_hf.storage import save_safetensors

__all__ = ["DamagedFileError", "SparseFile", "TensorRecord", "encode", "write_sparse"]

KEY = "mfac_sparse"
# In these one bit pattern besides 0 is a zero: the sign bit alone.
_SIGNED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def _index_dtypes(columns: int) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Return the dtypes of counts and of columns."""
    return np.min_scalar_type(columns), np.min_scalar_type(max(columns - 1, 0))


def encode(name: str, tensor: Tensor) -> tuple[TensorRecord, dict[str, Tensor]]:
    """Encode a tensor in the fewest bytes; where encodings tie, in the simplest of them.

    Args:
        name: its name, for messages.
        tensor: any strided tensor of a dtype that safetensors stores; copied to the CPU.

    Returns:
        Its record, and its parts by name.

    Raises:
        ValueError: the tensor has no plain values (meta device, another layout) or a dtype that safetensors lacks.
    """
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.dtype == torch.complex128:
        raise ValueError(
            f"{name} cannot be stored: layout {tensor.layout}, device {tensor.device}, dtype {tensor.dtype}; expected "
            "a strided tensor with values, of a dtype that safetensors has"
        )
    values = tensor.detach().cpu().contiguous().reshape(-1)
    bits = values.view(BITS[values.element_size()]).numpy()
    keep = (bits & (2 ** (8 * bits.itemsize - 1) - 1) if tensor.dtype in _SIGNED else bits) != 0
    rows, columns = rows_and_columns(tuple(tensor.shape))
    count_dtype, column_dtype = _index_dtypes(columns)
    kept = int(np.count_nonzero(keep))
    size = {
        "dense": bits.nbytes,
        "bitmask": (bits.size + 7) // 8 + kept * bits.itemsize,
        "csr": rows * count_dtype.itemsize + kept * (column_dtype.itemsize + bits.itemsize),
    }
    if not fits_file(bits.nbytes, size["csr"], GRANTED_TO_TENSOR):
        del size["csr"]
    encoding = min(size, key=lambda kind: size[kind])
    parts: dict[str, Tensor] = {}
    if encoding == "bitmask":
        parts["mask"] = torch.from_numpy(np.packbits(keep, bitorder="little"))
        values = values[torch.from_numpy(keep)]
    elif encoding == "csr":
        row_of, column_of = np.nonzero(keep.reshape(rows, columns))
        parts["counts"] = torch.from_numpy(np.bincount(row_of, minlength=rows).astype(count_dtype))
        parts["columns"] = torch.from_numpy(column_of.astype(column_dtype))
        values = values[torch.from_numpy(keep)]
    parts["values"] = values.reshape(tensor.shape) if encoding == "dense" else values
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorRecord(encoding, dtype, tuple(tensor.shape), _digest(parts.values())), parts


def _digest(parts: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.contiguous().reshape(-1).view(BITS[part.element_size()]).numpy().data)
    return digest.hexdigest()


def write_sparse(path: str | os.PathLike[str], tensors: Iterator[tuple[str, Tensor]], tied: Mapping[str, str]) -> None:
    """Write a sparse file; an existing one is replaced only by a complete one.

    Args:
        path: the file.
        tensors: names and tensors, each tensor once.
        tied: further names of these tensors: ``{further name: name among the tensors}``.

    Raises:
        ValueError: a tensor that cannot be stored (`encode`).
    """
    parts: dict[str, Tensor] = {}
    records = {}
    for name, tensor in tensors:
        records[name], pieces = encode(name, tensor)
        parts |= {f"{name}/{part}": piece for part, piece in pieces.items()}
    # one entry, as safetensors writes several in an order that changes from run to run
    metadata = {KEY: header_text(records, tied)}
    save_safetensors(path, parts, metadata)


class SparseFile:
    """A sparse file, read tensor by tensor.

    Attributes:
        path: where it lies.
        records: what its header says about each tensor, by name.
        tied: further names of these tensors: ``{further name: name among the records}``.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not a sparse file, its header is damaged, or a later version wrote it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is no file")
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata, keys = file.metadata() or {}, set(file.keys())
        except (SafetensorError, OSError) as error:  # OSError: shorter than its own header says
            raise DamagedFileError(
                f"{self.path} is truncated or damaged: {error}. Copy or download it again"
            ) from error
        if KEY not in metadata:
            raise DamagedFileError(
                f"{self.path} is not a sparse file: its metadata has {sorted(metadata)}, expected {KEY!r}. "
                "from_pretrained reads an ordinary model.safetensors"
            )
        header = parse_header(metadata[KEY], self.path)
        self.records, self.tied = header.records, header.tied
        expected = {f"{name}/{part}" for name, record in self.records.items() for part in PARTS[record.encoding]}
        if keys != expected:
            raise DamagedFileError(
                f"{self.path} does not hold what its header lists: missing {sorted(expected - keys)}, not listed "
                f"{sorted(keys - expected)}"
            )

    def read(self, name: str) -> Tensor:
        """Read a tensor and check it against its record.

        Raises:
            KeyError: there is no such tensor.
            DamagedFileError: its bytes, indices or sizes are not what the header says.
        """
        record = self.records[name]
        # The file is opened for each tensor: until it is closed, the pages that were read count as this process's
        # memory, and in the end the whole file would lie in memory beside the model.
        with safe_open(self.path, framework="pt") as file:
            parts = {part: file.get_tensor(f"{name}/{part}") for part in PARTS[record.encoding]}
            if _digest(parts.values()) != record.sha256:
                raise DamagedFileError(f"{name} in {self.path} does not match its checksum. Copy or download it again")
            try:
                return _decode(record, parts)
            except ValueError as error:
                raise DamagedFileError(f"{name} in {self.path}: {error}") from None


def _decode(record: TensorRecord, parts: dict[str, Tensor]) -> Tensor:
    """Put a tensor together from its parts; a ValueError says what does not fit."""
    values = parts["values"]
    if values.dtype != record.torch_dtype:
        raise ValueError(f"values are {values.dtype}, the header says {record.dtype}")
    if record.encoding == "dense":
        if tuple(values.shape) != record.shape:
            raise ValueError(f"values have shape {tuple(values.shape)}, the header says {record.shape}")
        return values.clone()  # the original may be a view of the file
    positions = _bitmask_positions if record.encoding == "bitmask" else _csr_positions
    where = positions(record, parts)
    bits = torch.zeros(record.numel, dtype=BITS[record.torch_dtype.itemsize])
    bits.numpy()[where] = values.view(bits.dtype).numpy()
    return bits.view(record.torch_dtype).reshape(record.shape)


def _bitmask_positions(record: TensorRecord, parts: dict[str, Tensor]) -> np.ndarray[Any, Any]:
    """Return booleans, True where a value goes."""
    mask, numel = parts["mask"], record.numel
    if mask.dtype != torch.uint8 or tuple(mask.shape) != ((numel + 7) // 8,):
        raise ValueError(
            f"the mask is {mask.dtype} of shape {tuple(mask.shape)}, which does not fit shape {record.shape}"
        )
    flags = np.unpackbits(mask.numpy(), bitorder="little").view(bool)
    if flags[numel:].any():
        raise ValueError(f"index out of range: the mask has bits set after the last of {numel} weights")
    kept = int(np.count_nonzero(flags))
    if tuple(parts["values"].shape) != (kept,):
        raise ValueError(f"the mask keeps {kept} weights, values have shape {tuple(parts['values'].shape)}")
    return flags[:numel]


def _csr_positions(record: TensorRecord, parts: dict[str, Tensor]) -> np.ndarray[Any, Any]:
    """Return the flat indices of the values."""
    rows, columns = record.rows_and_columns
    expected = [torch.from_numpy(np.empty(0, dtype)).dtype for dtype in _index_dtypes(columns)]
    found = [parts["counts"].dtype, parts["columns"].dtype]
    if found != expected or tuple(parts["counts"].shape) != (rows,):
        raise ValueError(
            f"counts are {found[0]} of shape {tuple(parts['counts'].shape)} and columns {found[1]}; expected "
            f"{expected[0]} of shape ({rows},) and {expected[1]}"
        )
    counts, column_of = parts["counts"].numpy(), parts["columns"].numpy()
    if rows and int(counts.max()) > columns:
        raise ValueError(f"counts reach {int(counts.max())} in rows of {columns}")
    counts = counts.astype(np.int64)
    kept = int(counts.sum())
    if column_of.shape != (kept,) or tuple(parts["values"].shape) != (kept,):
        raise ValueError(
            f"counts add up to {kept}, columns have shape {column_of.shape}, values {tuple(parts['values'].shape)}"
        )
    if kept and int(column_of.max()) >= columns:
        raise ValueError(
            f"index out of range: column {int(column_of.max())} in rows of {columns} (columns 0 to {columns - 1})"
        )
    where = np.repeat(np.arange(rows, dtype=np.int64) * columns, counts) + column_of.astype(np.int64)
    if kept and (np.diff(where) <= 0).any():
        raise ValueError("columns are not ascending within a row")
    return where
