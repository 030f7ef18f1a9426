"""Committed tables of results (`bench/results/*.md`) read back, so that pictures need no new measurement."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADING = re.compile(r"^## (\w+)(, measured again)?$")
# The columns that a line needs; the names are those of `report.COLUMNS`.
_NEEDED = ("lengths", "rows x mean (longest)", "sizes", "dtype", "pass", "best peer", "ratio", "of limit")
# "2.42x", or the range of several runs, "2.42 to 2.96x".
_RATIO = re.compile(r"([\d.]+)(?: to ([\d.]+))?x")


@dataclass(frozen=True)
class Result:
    """One line of a table: this package against its best peer, and its share of the machine's nearer limit.

    `ratio` is the smallest of several runs'; `ratio_text` has their range.
    """

    op: str
    lengths: str
    shape: str
    sizes: str
    dtype: str
    direction: str
    ratio: float
    peer: str
    share: float
    limit: str
    ratio_text: str


def ratios(cell: str) -> tuple[float, ...]:
    """The ratio of a cell, or both ends of its range; nothing where the machine was busy."""
    found = _RATIO.fullmatch(cell)
    return tuple(float(number) for number in found.groups() if number) if found else ()


def read_lines(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Every line of the tables of ops in the file's order: the op and the cells by column."""
    return [(op, cells) for op, _, cells in _lines(path)]


def read_results(path: Path) -> list[Result]:
    """Every line that has a ratio, in the file's order.

    A line under the heading of an op, "measured again", takes the place of the op's other line of the same shape.

    Raises:
        ValueError: the file has no table of results.
    """
    results: dict[tuple[str, ...], tuple[Result, bool]] = {}
    for op, again, cells in _lines(path):
        if result := _result(op, cells):
            key = op, result.lengths, result.shape, result.sizes, result.dtype, result.direction
            earlier, earlier_again = results.pop(key, (result, again))
            results[key] = (result, True) if again else (earlier if earlier_again else result, earlier_again)
    if not results:
        raise ValueError(f"{path}: wanted a table of results with the columns {', '.join(_NEEDED)}; found none")
    return [result for result, _ in results.values()]


def _lines(path: Path) -> Iterator[tuple[str, bool, dict[str, str]]]:
    """Op, whether the heading says "measured again", and cells, of each line that has the columns needed."""
    op, again, columns = "", False, []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = _HEADING.match(line)
            op, again = (heading[1], bool(heading[2])) if heading else ("", False)
            columns = []
        elif op and line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            if not columns:
                columns = cells
            elif set(_NEEDED) <= set(columns) and not set(cells) <= {"---"}:
                yield op, again, dict(zip(columns, cells, strict=True))


def _result(op: str, cells: dict[str, str]) -> Result | None:
    lengths, shape, sizes, dtype, direction, peer, ratio, limit = (cells[name] for name in _NEEDED)
    numbers = ratios(ratio)
    share = re.fullmatch(r"([\d.]+) (\w+)", limit)
    if not numbers or share is None:
        return None
    name = peer.partition(" (")[2].removesuffix(")")
    return Result(op, lengths, shape, sizes, dtype, direction, numbers[0], name, float(share[1]), share[2], ratio)
