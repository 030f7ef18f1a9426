"""Settings that people write, in YAML, on the command line or in code: of the right kind, and within bounds."""

from __future__ import annotations

import re
from reprlib import Repr

LARGEST = 2**31 - 1  # of sizes and counts
SEEDS = 2**32 - 1  # the largest that all generators take, after what is mixed in
FLOAT32 = 3.4028234663852886e38  # the largest number of it

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def shown(value: object) -> str:
    """`repr(value)` for a message: of bounded length, whatever a file made of it."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return f"a {type(value).__name__} too long to show"


def kind(name: str, value: object, *kinds: type) -> None:
    """Raises unless `value` is of one of the kinds `int`, `float`, `str`; a bool is no number."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        words = {int: "an int", float: "a number", str: "a text"}
        raise TypeError(f"{name} must be {words[kinds[-1]]}, found {shown(value)}")


def whole(name: str, value: object, low: int, high: int = LARGEST) -> None:
    """Raises unless `value` is a whole number from `low` to `high`."""
    kind(name, value, int)
    assert isinstance(value, int)
    if not low <= value <= high:
        wanted = f"at least {low}" if value < low and high == LARGEST else f"{low} to {high}"
        raise ValueError(f"{name} must be {wanted}, found {shown(value)}")


def seed(name: str, value: object) -> None:
    """Raises unless `value` is a seed."""
    whole(name, value, 0, SEEDS)


def number(name: str, value: object, low: float, high: float, *, above: bool = False, below: bool = True) -> None:
    """Raises unless `value` is a number from `low` (or `above` it) to `high` (or `below` it)."""
    kind(name, value, int, float)
    assert isinstance(value, (int, float))
    holds = (low < value if above else low <= value) and (value < high if below else value <= high)
    if not (holds and finite_in_float32(value)):
        ends = f"{'(' if above else '['}{low}, {high}{')' if below else ']'}"
        raise ValueError(f"{name} must lie in {ends}, found {shown(value)}")


def finite_in_float32(value: float) -> bool:
    """Whether the number stays finite where it is kept in float32."""
    return abs(value) <= FLOAT32


def why_no_file_name(text: str) -> str | None:
    """What is wanted of `text` to name files; None where they may be called so."""
    if not re.fullmatch(r"[\w.-]+", text):
        return "letters, digits and . _ -"
    if text.startswith("."):
        return "a name without a dot in front"
    return "a name of at most 100 bytes" if len(text.encode()) > 100 else None
