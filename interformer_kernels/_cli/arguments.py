"""Argument types shared by several commands; argparse reports their errors with exit status 2."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

_MAX_COUNT = 2**31 - 1
_T = TypeVar("_T")


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or len(text) > 10 or not 1 <= int(text) <= _MAX_COUNT:
        raise argparse.ArgumentTypeError(f"wanted a whole number of at least 1, found {text[:40]!r}")
    return int(text)


def duration(text: str) -> float:
    """A number of seconds or minutes, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"wanted a number of at least 0, found {text[:40]!r}")
    return value


class Part(NamedTuple):
    """Part `number`, counted from 1, of `parts` parts."""

    number: int
    parts: int

    def select(self, items: Sequence[_T]) -> Sequence[_T]:
        """This part of `items`: a contiguous slice; all parts together cover the items once."""
        return items[len(items) * (self.number - 1) // self.parts : len(items) * self.number // self.parts]


def part(text: str) -> Part:
    """`K/N`, with K from 1 to N."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"wanted K/N, K from 1 to N, found {text[:40]!r}")
    return Part(int(match[1]), int(match[2]))
