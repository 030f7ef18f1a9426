"""Checks of settings from YAML, the command line or code: type and bounds."""

from __future__ import annotations

import re
from reprlib import Repr

LARGEST = 2**31 - 1  # the largest size or count
SEEDS = 2**32 - 1  # the largest seed; all generators accept it, also after epoch and rank are mixed in
FLOAT32 = 3.4028234663852886e38  # the largest float32

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def short_repr(value: object) -> str:
    """`repr(value)` for a message, of bounded length for any value."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # The value is an int with more digits than Python prints.
        return f"a {type(value).__name__} too long to show"


def kind(name: str, value: object, *kinds: type) -> None:
    """Raise unless `value` is of one of the types `kinds`, among `int`, `float`, `str`; a bool is not a number."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = {int: "an int", float: "a number", str: "a string"}
        raise TypeError(f"{name} must be {names[kinds[-1]]}, found {short_repr(value)}")


def whole(name: str, value: object, low: int, high: int = LARGEST) -> None:
    """Raise unless `value` is a whole number from `low` to `high`."""
    kind(name, value, int)
    assert isinstance(value, int)
    if not low <= value <= high:
        expected = f"at least {low}" if value < low and high == LARGEST else f"{low} to {high}"
        raise ValueError(f"{name} must be {expected}, found {short_repr(value)}")


def seed(name: str, value: object) -> None:
    """Raise unless `value` is a seed."""
    whole(name, value, 0, SEEDS)


def number(name: str, value: object, low: float, high: float, *, above: bool = False, below: bool = True) -> None:
    """Raise unless `value` is a number from `low` to `high`; `above` and `below` exclude these bounds."""
    kind(name, value, int, float)
    assert isinstance(value, (int, float))
    inside = (low < value if above else low <= value) and (value < high if below else value <= high)
    if not (inside and finite_in_float32(value)):
        interval = f"{'(' if above else '['}{low}, {high}{')' if below else ']'}"
        raise ValueError(f"{name} must lie in {interval}, found {short_repr(value)}")


def finite_in_float32(value: float) -> bool:
    """Whether the number is finite in float32."""
    return abs(value) <= FLOAT32


def why_no_file_name(text: str) -> str | None:
    """The requirement that `text` misses as a file name; None if it is a valid one."""
    if not re.fullmatch(r"[\w.-]+", text):
        return "letters, digits and . _ -"
    if text.startswith("."):
        return "a name without a dot in front"
    return "a name of at most 100 bytes" if len(text.encode()) > 100 else None
