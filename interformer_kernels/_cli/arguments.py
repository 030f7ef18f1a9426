"""Kinds of arguments that several commands take: argparse says what is wrong, with exit status 2."""

from __future__ import annotations

import argparse
import math

_MOST = 2**31 - 1


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or len(text) > 10 or not 1 <= int(text) <= _MOST:
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
