"""What was read from JSON has the form of a type, or the first place that has not is named."""

from typing import Any, Literal, TypedDict

import pytest

from mfac_hf.schema import check_schema


class Part(TypedDict, total=False):
    size: int
    note: str | None


class Whole(Part):
    parts: list[Part]
    levels: dict[str, float]
    kind: Literal["a", "b"] | None


GOOD = {"parts": [{"size": 1}, {"note": None, "more": object}], "levels": {"x": 1, "y": 0.5}, "kind": "a", "size": 3}


def test_what_fits_passes():
    check_schema(GOOD, Whole, "f.json")
    check_schema({**GOOD, "kind": None, "levels": {}}, Whole, "f.json")
    check_schema([[1.0], []], list[list[float]], "f.json")
    check_schema({"anything": [object]}, dict[str, Any], "f.json")
    check_schema([1], str | list[int], "f.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": None}, r"f.json: parts is null; expected a list \(each item an object\)"),
        ({"parts": [{"size": 1}, {"size": "1"}]}, r"f.json: parts\[1\].size is '1'; expected a whole number"),
        ({"size": True}, "size is True; expected a whole number"),
        ({"size": 1.0}, "size is 1.0; expected a whole number"),
        ({"note": 3}, "note is 3; expected text or null"),
        ({"levels": {"x": "high"}}, "levels.x is 'high'; expected a number"),
        ({"levels": {"x": False}}, "levels.x is False; expected a number"),
        ({"levels": {1: 1.0}}, "levels, a key, is 1; expected text"),
        ({"levels": {"x": 10**5000}}, "levels.x is an enormous number; expected a number"),
        ({"levels": [1]}, "levels is a list of 1; expected an object"),
        ({"kind": "c"}, "kind is 'c'; expected 'a' or 'b' or null"),
        ({"note": {"x": 1}}, "note is a mapping of 1; expected text or null"),
        ({"size": "x" * 500}, "size is 'x{58,59}…; expected a whole number"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        check_schema({**GOOD, **change}, Whole, "f.json")


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="f.json holds an object without 'levels'; expected one that has it"):
        check_schema({key: value for key, value in GOOD.items() if key != "levels"}, Whole, "f.json")
    with pytest.raises(ValueError, match="f.json holds a list of 0; expected an object"):
        check_schema([], Whole, "f.json")


def test_of_two_forms_the_nearer_one_is_explained():
    with pytest.raises(ValueError, match=r"f.json: \[1\] is 'x'; expected a whole number"):
        check_schema([1, "x"], str | list[int], "f.json")
