"""Buffers of a loaded state, which whoever loaded it may still hold: they are copied before they are written.

A resumed run reads its state from a file, loads it and drops it: nobody else holds it at the next step, and a window
of many gigabytes is not held twice. A program that keeps the state, to come back to it, finds it as it was.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mfac_hf.fisher.columns import ColumnStore, DenseColumns, RowSparseColumns
from mfac_hf.machine import prefer_huge_pages
from mfac_hf.memory import require_memory

__all__ = ["alias", "own_buffers"]


def own_buffers(columns: ColumnStore, views: int) -> None:
    """Copy the buffers of a store, if others hold them too.

    Args:
        columns: the store, which has not been written since it was loaded.
        views: parameters in a dense store: the optimizer's state holds a view of the buffer for each.

    Raises:
        MemoryError: if the copy does not fit; nothing changes then.
    """
    if isinstance(columns, DenseColumns):
        if _is_shared(columns.buffer_MD, 1 + views):
            columns.buffer_MD = _copy(columns.buffer_MD)
    elif isinstance(columns, RowSparseColumns) and (
        _is_shared(columns.rows_MN, 1) or _is_shared(columns.values_MNH, 1)
    ):
        columns.values_MNH = _copy(columns.values_MNH)
        columns.rows_MN = columns.rows_MN.clone()


def alias(tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """A tensor in the memory of another one, as ``as_strided``, that does not keep the other one alive."""
    return tensor.new_empty(0).set_(tensor.untyped_storage(), offset, size, stride)


def _is_shared(buffer: Tensor, own: int) -> bool:
    """Whether more than ``own`` tensors lie in the memory of a buffer."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = buffer.untyped_storage()
    return count is None or count(storage._cdata) - 1 > own  # the storage object here is one more holder


def _copy(buffer: Tensor) -> Tensor:
    require_memory(buffer.nbytes, buffer.device, "a copy of a loaded window, which another variable holds too")
    copy = torch.empty_like(buffer)
    prefer_huge_pages(copy)  # before its pages are touched
    return copy.copy_(buffer)
