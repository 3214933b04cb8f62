"""What `scripts/same_bits.py` runs on two revisions: small deterministic runs through public names.

A scenario takes the root of the checkout whose package runs, a folder of its own, and a folder that the runs on both
revisions share: what the older one saves there, both load. It returns tensors, bytes, numbers and texts in nested
dictionaries and lists, or None where it lacks the data that it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from scenarios import cards, fisher, gradual, one_shot, optimizer, programs, sparse

__all__ = ["SCENARIOS"]

Scenario = Callable[[Path, Path, Path], Any]
SCENARIOS: dict[str, Scenario] = {
    f"{module.__name__.rpartition('.')[2]} {name.replace('_', ' ')}": function
    for module in (optimizer, fisher, one_shot, gradual, sparse, cards, programs)
    for name in module.__all__
    for function in [getattr(module, name)]
}
