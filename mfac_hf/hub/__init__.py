"""Model cards made from measured results, and pushing models with them."""

import importlib
from typing import TYPE_CHECKING, Any

from mfac_hf.hub.push import PushError, push_to_hub

if TYPE_CHECKING:
    from mfac_hf.hub.trainer_card import attach_card

__all__ = ["PushError", "attach_card", "push_to_hub"]


def __getattr__(name: str) -> Any:
    if name != "attach_card":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not above: it waits for transformers, and pushing a directory need not.
    return importlib.import_module("mfac_hf.hub.trainer_card").attach_card
