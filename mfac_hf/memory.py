"""The memory that `MFAC` takes, estimated before anything is allocated."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mfac_hf.defaults import MFAC_METRIC, TOUCHED_EMBEDDING_ROWS, defaults_of
from mfac_hf.machine import GIB, available_bytes

__all__ = ["MemoryEstimate", "adamw_bytes", "gram_matrix_bytes", "memory_estimate", "require_memory"]

# m x m matrices that a step holds at once, in float64, where it factors anew: the Gram matrix, the factor that is in
# use, and the one that replaces it with the rows that it is made of.
GRAM_MATRICES = 4


class MemoryEstimate(NamedTuple):
    """Size of an optimizer's state.

    Attributes:
        bytes: the total.
        breakdown: in words, a line for each part.
    """

    bytes: int
    breakdown: str


def memory_estimate(
    model_or_numel: nn.Module | int,
    num_grads: int | None = None,
    window_dtype: torch.dtype | None = None,
    *,
    metric: str = MFAC_METRIC,
    embedding_rows: int | None = TOUCHED_EMBEDDING_ROWS,
) -> MemoryEstimate:
    """Memory that `MFAC` would allocate: m numbers for each dense parameter, a second moment, and the Gram matrix.

    Embedding tables are stored by the rows that each batch looks up. Their number depends on the data: about 250 for
    SST-2 in batches of 32, about 1,500 for SQuAD in batches of 12.

    Args:
        model_or_numel: a model, whose trainable parameters are counted, or the number of (dense) parameters.
        num_grads: length of the window, m; None for the metric's default.
        window_dtype: storage type of the dense part; None for the metric's default.
        metric: of `MFAC`; ``"adam"`` has a second moment of every parameter.
        embedding_rows: rows of each embedding table that one batch touches; None counts embeddings as dense.

    Returns:
        The bytes, and a line in words for each part, with the bytes a parameter beside those of AdamW.

    Raises:
        ValueError: if ``num_grads`` or the number of parameters is below 1, ``embedding_rows`` below 0, or the metric
            unknown.
    """
    defaults = defaults_of(metric)
    num_grads = defaults["num_grads"] if num_grads is None else num_grads
    window_dtype = getattr(torch, defaults["window_dtype"]) if window_dtype is None else window_dtype
    if num_grads < 1:
        raise ValueError(f"num_grads is {num_grads}; expected at least 1")
    if embedding_rows is not None and embedding_rows < 0:
        raise ValueError(f"embedding_rows is {embedding_rows}; expected at least 0, or None for dense embeddings")
    tables = {} if isinstance(model_or_numel, int) or embedding_rows is None else input_embeddings(model_or_numel)
    numel = _trainable(model_or_numel)
    if numel < 1:
        raise ValueError(f"{numel} parameters to optimize; expected at least 1")
    dense = numel - sum(table.numel() for table in tables.values())
    size = num_grads * dense * window_dtype.itemsize
    sizes = {f"dense: {num_grads} x {dense:,} x {window_dtype.itemsize} bytes": size}
    for name, table in tables.items():
        rows = min(embedding_rows or 0, table.shape[0])
        words = f"{name}: {num_grads} x {rows} of {table.shape[0]:,} rows x {table.shape[1]}"
        sizes[words] = num_grads * rows * (table.shape[1] * 4 + 8)
    if metric == "adam":
        itemsize = max(4, window_dtype.itemsize)
        steps = 8 * sum(table.shape[0] for table in tables.values())
        sizes[f"second moment: {numel:,} x {itemsize} bytes"] = numel * itemsize + steps
    gram = gram_matrix_bytes(num_grads)
    sizes[f"Gram matrix and factor: {GRAM_MATRICES} x {num_grads} x {num_grads} x 8 bytes"] = gram
    total, adamw = sum(sizes.values()), adamw_bytes(model_or_numel)
    lines = [f"{words} = {size / GIB:.2f} GiB" for words, size in sizes.items()]
    lines.append(
        f"total: {total / GIB:.2f} GiB, {total / numel:.1f} bytes a parameter (AdamW: {adamw / GIB:.2f} GiB, "
        f"{adamw / numel:.0f} bytes)"
    )
    return MemoryEstimate(total, "\n".join(lines))


def adamw_bytes(model_or_numel: nn.Module | int) -> int:
    """Bytes of AdamW's two moments in float32, of a model's trainable parameters or of a number of parameters."""
    return 8 * _trainable(model_or_numel)


def _trainable(model_or_numel: nn.Module | int) -> int:
    if isinstance(model_or_numel, int):
        return model_or_numel
    return sum(p.numel() for p in model_or_numel.parameters() if p.requires_grad)


def gram_matrix_bytes(num_grads: int) -> int:
    """Bytes of the m x m float64 matrices of a step, which lie on the window's first device."""
    return GRAM_MATRICES * num_grads**2 * torch.float64.itemsize


def input_embeddings(model: nn.Module) -> dict[str, Tensor]:
    """Trainable embedding tables large enough to be stored by rows, each once, without those of an output layer."""
    shared = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    tables = {
        module.weight: name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module.weight.requires_grad
        and module.weight not in shared
        and module.weight.numel() >= ROW_SPARSE_MIN_NUMEL
    }
    return {name: table for table, name in tables.items()}


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
            "free. Ways out: a smaller num_grads (with metric='identity' lr raised by the same factor), "
            "window_dtype=torch.bfloat16, freezing the embeddings, window_device='cpu' for host memory or a list of "
            "devices, more ranks with process_group"
        )
