"""Whether two sets of tensors are the same, to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["fingerprint"]


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of tensors, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
