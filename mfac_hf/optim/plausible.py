"""Values that a saved state can have: what no optimizer would have saved is refused before it does harm.

The shapes are right already (`mfac_hf.optim.state`). This looks at the numbers: counters, places, and whether the Gram
matrix is one of the stored gradients.
"""

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from mfac_hf.fisher.definite import is_number

__all__ = [
    "as_count",
    "check_counters",
    "check_gram",
    "check_momentum",
    "check_places",
    "check_second_moment",
    "squared_lengths",
]

# How far a squared length that the Gram matrix holds may be from that of the stored gradient. Products in float32 are
# right to about 1e-6; a damaged state is wrong by far more.
TOLERANCE = 1e-3


def as_count(state: Mapping[str, Any], key: str, least: int, label: str) -> int:
    """A whole number from a saved state, of whatever type.

    Raises:
        ValueError: for another type, or a number below ``least``.
    """
    value = state[key]
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point() and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{key} of {label} is {value!r:.80} in the saved state; expected a whole number >= {least}")
    return int(value)


def check_counters(state: dict[str, Any], label: str) -> None:
    """Whole numbers where a parameter's state has counters; kept as plain ones.

    Raises:
        ValueError: for a counter of another type or below its least value.
    """
    least = {"window_store": 0, "window_start": 0, "pushed": 1, "skipped_steps": 0, "jitter_escalations": 0}
    for key in least.keys() & state.keys():
        state[key] = as_count(state, key, least[key], label)
    if "step" in state and not (is_number(state["step"]) and 0 <= state["step"] < float("inf")):
        raise ValueError(f"step of {label} is {state['step']!r:.80} in the saved state; expected a number of steps")


def check_momentum(momentum: Tensor, label: str) -> None:
    """Raise a ValueError for an average of directions with entries that are not finite."""
    if not momentum.is_floating_point() or not bool(momentum.isfinite().all()):
        raise ValueError(f"the saved momentum of {label} has entries that are not finite numbers: a damaged file")


def check_second_moment(state: dict[str, Any], shape: torch.Size, label: str) -> None:
    """The second moment of Adam's metric belongs to such a parameter, has squares for entries, and its steps.

    Raises:
        ValueError: for another shape or type, entries below 0 or not finite, or steps that cannot be.
    """
    moment, mask, steps = state.get("second_moment"), state.get("mask"), state.get("moment_steps")
    if moment is None:
        return
    expected = tuple(shape) if mask is None or steps is not None else (int(mask.sum()),)
    if tuple(moment.shape) != expected or not moment.is_floating_point():
        raise ValueError(
            f"the saved second moment of {label} is {moment.dtype} of shape {tuple(moment.shape)}; expected shape "
            f"{expected}: another model"
        )
    if not bool(((moment >= 0) & moment.isfinite()).all()):
        raise ValueError(f"the saved second moment of {label} has entries below 0 or not finite: a damaged file")
    state.setdefault("moment_step", None)
    step = state["moment_step"] = as_count(state, "moment_step", 1, label)
    if steps is None:
        return
    if steps.shape != shape[:1] or steps.dtype != torch.int64 or not 0 <= int(steps.min()) <= int(steps.max()) <= step:
        raise ValueError(f"the saved moment_steps of {label} are not those of {step} steps: a damaged file")


def check_places(states: Iterable[tuple[dict[str, Any], int]]) -> None:
    """The columns of each store follow one another without a gap, and a table has its store for itself.

    Args:
        states: of each parameter with columns, and how many these are.

    Raises:
        ValueError: names the store and the place where something else was expected.
    """
    stores: dict[int, list[tuple[int, int, bool]]] = {}
    for state, size in states:
        stores.setdefault(state["window_store"], []).append((state["window_start"], size, "window_rows" in state))
    for store, members in stores.items():
        expected = 0
        for start, size, is_table in sorted(members):
            if start != expected or (is_table and len(members) > 1):
                raise ValueError(
                    f"the saved columns of window_store {store} begin at window_start {start} where {expected} was "
                    "expected: two parameters in one place, or one missing. The file is damaged"
                )
            expected += size


def check_gram(lead: dict[str, Any], states: Iterable[dict[str, Any]]) -> None:
    """The Gram matrix can be one, and its diagonal has the squared lengths of the stored gradients.

    This reads the window once.

    Args:
        lead: the state with the Gram matrix and the counters.
        states: of every parameter with columns.

    Raises:
        ValueError: says what cannot be.
    """
    gram_MM = lead["gram"].double()
    count = min(lead["pushed"], len(gram_MM))
    diagonal_M = gram_MM.diagonal()
    lengths = diagonal_M.clamp(min=0).sqrt()
    bound_MM = lengths.outer(lengths)  # Cauchy and Schwarz
    wrong = None
    if not bool(gram_MM.isfinite().all()):
        wrong = "has entries that are not finite"
    elif (
        bool((diagonal_M < 0).any())
        or bool((gram_MM.abs() > (1 + TOLERANCE) * bound_MM).any())
        or bool(((gram_MM - gram_MM.T).abs() > TOLERANCE * bound_MM).any())
    ):
        wrong = "is no matrix of dot products"
    elif bool(gram_MM[count:].any()):
        wrong = f"has gradients beyond the {count} that were stored (pushed is {lead['pushed']})"
    else:
        lengths_M = torch.zeros(count, dtype=torch.float64)
        for state in states:
            lengths_M += squared_lengths(state, count)
        held_M = diagonal_M[:count].cpu()
        if not bool(((lengths_M - held_M).abs() <= TOLERANCE * torch.maximum(lengths_M, held_M)).all()):
            wrong = "does not belong to the stored gradients: their lengths are others"
    if wrong:
        raise ValueError(f"the saved Gram matrix {wrong}. The file is damaged, or its state was changed")


def squared_lengths(state: dict[str, Any], count: int) -> Tensor:
    """Squared lengths of the first stored gradients of one parameter, (count,), float64."""
    values = state["window" if "window" in state else "window_values"]
    squared_M = torch.zeros(count, dtype=torch.float64)
    for row in range(count):  # one by one: torch makes a float64 copy of what it takes the norm of
        numbers = values[row]
        if "window_rows" in state:
            numbers = numbers[state["window_rows"][row] < state["table_height"]]
        squared_M[row] = torch.linalg.vector_norm(numbers, dtype=torch.float64).square()
    return squared_M
