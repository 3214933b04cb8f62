"""Compare what was read from JSON or YAML with the types that a reader expects, before it is used.

A kind of file is described by a ``TypedDict``: keys that readers use, with their types. Keys that it does not name are
left alone, so that files of later versions and of other programs can be read.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

__all__ = ["check_schema"]

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
_SHOWN = 60  # characters of a wrong value


def check_schema(value: Any, kind: Any, name: str) -> None:
    """Raise an error unless a value has the form of a type.

    Args:
        value: what a JSON or YAML file held.
        kind: ``str``, ``int``, ``float`` (whole numbers too), ``bool``, None, ``Any``, ``Literal``, a union,
            ``list[X]``, ``dict[K, X]``, or a ``TypedDict`` of these. True and False are no numbers.
        name: name of the file, or of what the value was taken from; it begins the message.

    Raises:
        ValueError: it has not; the message names the first place that differs, what is there and what was expected.
    """
    if (found := _difference(value, kind, "")) is not None:
        place, seen, expected = found
        where = f"{name}: {place.removeprefix('.')} is" if place else f"{name} holds"
        raise ValueError(f"{where} {seen}; expected {expected}")


def _difference(value: Any, kind: Any, place: str) -> tuple[str, str, str] | None:
    """Find the first place that differs, and return it with what is there and what was expected, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        found = [_difference(value, one, place) for one in arguments]
        if None in found:
            return None
        # Of an object or list the difference inside it says more than that no kind fits.
        inner = next((one for one in found if one is not None and one[0] != place), None)
        return inner or (place, _shown(value), _words(kind))
    if origin in (list, dict) or is_typeddict(kind):
        if not isinstance(value, list if origin is list else Mapping):
            return place, _shown(value), _words(kind)
        return next((one for one in _differences_inside(value, kind, place) if one is not None), None)
    return None if _fits(value, kind) else (place, _shown(value), _words(kind))


def _differences_inside(value: Any, kind: Any, place: str) -> Any:
    """Iterate over the differences of a list's or an object's parts."""
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        yield from (_difference(part, item, f"{place}[{index}]") for index, part in enumerate(value))
    elif get_origin(kind) is dict:
        keys, item = get_args(kind)
        for key, part in value.items():
            yield _difference(key, keys, f"{place}, a key,")
            yield _difference(part, item, f"{place}.{key}")
    else:
        for key, item in _hints(kind).items():
            if key in value:
                yield _difference(value[key], item, f"{place}.{key}")
            elif key in kind.__required_keys__:
                yield place, f"an object without {key!r}", "one that has it"


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if isinstance(value, int) and kind in (int, float):
        return abs(value) < 1 << 63  # files have no limit, arithmetic has
    return isinstance(value, type(None) if kind is None else kind)


def _words(kind: Any) -> str:
    """Say a type in the words of JSON."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(one) for one in get_args(kind))
    if origin is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if origin is list:
        return f"a list (each item {_words(get_args(kind)[0])})"
    if origin is dict or is_typeddict(kind):
        return "an object"
    return _WORDS.get(kind, "null" if kind is None else str(kind))


def _shown(value: Any) -> str:
    """Show a wrong value in short."""
    if isinstance(value, list | Mapping):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    try:
        text = "null" if value is None else repr(value)
    except ValueError:  # Python refuses to print whole numbers of more than some thousand digits
        text = "an enormous number"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
