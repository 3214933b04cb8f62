"""The memory that a gradient window takes, estimated before anything is allocated."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mfac_hf.defaults import TOUCHED_EMBEDDING_ROWS
from mfac_hf.machine import GIB, available_bytes

__all__ = ["MemoryEstimate", "gram_matrix_bytes", "memory_estimate", "require_memory"]

# m x m matrices that a step holds at once, in float64, where it factors anew: the Gram matrix, the factor that is in
# use, and the one that replaces it with the rows that it is made of.
GRAM_MATRICES = 4


class MemoryEstimate(NamedTuple):
    """Size of a gradient window.

    Attributes:
        bytes: the total.
        breakdown: in words, a line for each part.
    """

    bytes: int
    breakdown: str


def memory_estimate(
    model_or_numel: nn.Module | int,
    num_grads: int,
    window_dtype: torch.dtype = torch.float32,
    *,
    embedding_rows: int | None = TOUCHED_EMBEDDING_ROWS,
) -> MemoryEstimate:
    """Memory of the window that `MFAC` would allocate: m * d numbers for dense parameters, and the Gram matrix.

    Embedding tables are stored by the rows that each batch looks up. Their number depends on the data: about 250 for
    SST-2 in batches of 32, about 1,500 for SQuAD in batches of 12.

    Args:
        model_or_numel: a model, whose trainable parameters are counted, or the number of (dense) parameters.
        num_grads: length of the window, m.
        window_dtype: storage type of the dense part.
        embedding_rows: rows of each embedding table that one batch touches; None counts embeddings as dense.

    Returns:
        The bytes, and a line in words for each part.

    Raises:
        ValueError: if ``num_grads`` or the number of parameters is below 1, or ``embedding_rows`` below 0.
    """
    if num_grads < 1:
        raise ValueError(f"num_grads is {num_grads}; expected at least 1")
    if embedding_rows is not None and embedding_rows < 0:
        raise ValueError(f"embedding_rows is {embedding_rows}; expected at least 0, or None for dense embeddings")
    lines = []
    total = 0
    if isinstance(model_or_numel, int):
        dense = model_or_numel
    else:
        parameters = {p for p in model_or_numel.parameters() if p.requires_grad}
        tables = {} if embedding_rows is None else _input_embeddings(model_or_numel, parameters)
        for name, table in tables.items():
            rows = min(embedding_rows or 0, table.shape[0])
            size = num_grads * rows * (table.shape[1] * 4 + 8)
            total += size
            lines.append(
                f"{name}: {num_grads} x {rows} of {table.shape[0]:,} rows x {table.shape[1]} = {size / GIB:.2f} GiB"
            )
        dense = sum(p.numel() for p in parameters.difference(tables.values()))
    if dense + total < 1:
        raise ValueError(f"{dense} parameters to optimize; expected at least 1")
    size = num_grads * dense * window_dtype.itemsize
    gram = gram_matrix_bytes(num_grads)
    total += size + gram
    lines.insert(0, f"dense: {num_grads} x {dense:,} x {window_dtype.itemsize} bytes = {size / GIB:.2f} GiB")
    lines.append(
        f"Gram matrix and factor: {GRAM_MATRICES} x {num_grads} x {num_grads} x 8 bytes = {gram / GIB:.2f} GiB"
    )
    return MemoryEstimate(total, "\n".join([*lines, f"total: {total / GIB:.2f} GiB"]))


def gram_matrix_bytes(num_grads: int) -> int:
    """Bytes of the m x m float64 matrices of a step, which lie on the window's first device."""
    return GRAM_MATRICES * num_grads**2 * torch.float64.itemsize


def _input_embeddings(model: nn.Module, parameters: set[nn.Parameter]) -> dict[str, Tensor]:
    """Trainable embedding tables large enough to be stored by rows, without those that an output layer shares."""
    shared = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module.weight in parameters
        and module.weight not in shared
        and module.weight.numel() >= ROW_SPARSE_MIN_NUMEL
    }


# Below this size a table is cheaper to keep dense than to index.
ROW_SPARSE_MIN_NUMEL = 1 << 15


def require_memory(needed: int, device: torch.device, what: str) -> None:
    """Raise a MemoryError, with the numbers and the ways out, if ``needed`` bytes do not fit on the device.

    Args:
        needed: bytes.
        device: a CPU or CUDA device; others are not asked, as there is no portable way.
        what: what needs them, for the message.
    """
    if device.type not in ("cpu", "cuda"):
        return
    free = available_bytes(device)
    if needed > free:
        raise MemoryError(
            f"the gradient window needs {needed / GIB:.2f} GiB on {device} ({what}), and {free / GIB:.2f} GiB are "
            "free. Ways out: a smaller num_grads (and lr raised by the same factor), window_dtype=torch.bfloat16, "
            "freezing the embeddings, window_device='cpu' for host memory or a list of devices, more ranks with "
            "process_group"
        )
