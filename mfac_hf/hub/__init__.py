"""Model cards made from measured results, and pushing models with them."""

from mfac_hf.hub.push import PushError, push_to_hub

__all__ = ["PushError", "push_to_hub"]
