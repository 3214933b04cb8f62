"""How an operator of the library is registered with PyTorch's dispatcher, and how it is called.

Python owns the schemas and a PyTorch implementation of each operator; a native library only has to register a kernel
for CPU or CUDA under the same name, and every caller uses it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfac_hf.ops.build import load_native

__all__ = ["operators_for", "register"]

_library = torch.library.Library("mfac", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define the operator ``torch.ops.mfac.<name>``.

    Args:
        schema: name, arguments and results in PyTorch's notation.
        implementation: what answers on every device for which no native kernel is registered.
        fake: makes empty results of the right shapes and dtypes, for tracing.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mfac::{name}", fake, lib=_library)


def operators_for(operand: Tensor) -> Any:
    """Return ``torch.ops.mfac``, with the native kernels for the operand's device loaded where there are any."""
    if not torch.compiler.is_compiling():
        load_native(operand.device.type)
    return torch.ops.mfac
