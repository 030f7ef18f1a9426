"""Rows of a delimited file, in chunks, with the position of every cell."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from interformer.checks import short_repr
from interformer.data.errors import MalformedFileError

CHUNK = 1024  # rows held as text at a time
BOM = "\ufeff"
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file: the requested columns by name, and the line on which each row begins."""

    path: Path
    columns: dict[str, Sequence[str]]
    places: dict[str, int]
    lines: list[int]

    def cell_error(self, row: int, name: str, message: str) -> MalformedFileError:
        """The error for the cell of column `name` in row `row`, with its position in the file."""
        return MalformedFileError(self.path, self.lines[row], self.places[name] + 1, f"column {name!r} {message}")

    def numbers(self, name: str, empty: float | None = None) -> NDArray[np.float64]:
        """A column as finite numbers; empty cells count as `empty`, if it is given."""
        cells = self.columns[name]
        if empty is not None:
            cells = [cell or repr(empty) for cell in cells]
        try:
            values = np.fromiter(map(float, cells), np.float64, len(cells))
        except ValueError:
            values = np.array([_number(cell) for cell in cells])
        for row in np.flatnonzero(~np.isfinite(values)).tolist():
            raise self.cell_error(row, name, f"wanted a finite number, found {short_repr(cells[row])}")
        return values

    def labels(self, name: str) -> NDArray[np.float32]:
        """A column of 0 and 1."""
        values = self.numbers(name)
        for row in np.flatnonzero((values != 0) & (values != 1)).tolist():
            raise self.cell_error(row, name, f"wanted a label 0 or 1, found {short_repr(self.columns[name][row])}")
        return values.astype(np.float32)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def read_chunks(
    path: Path, column_names: list[str], separator: str, header: tuple[str, ...] | None, advance: Advance
) -> Iterator[Chunk]:
    """The rows of the file at `path` in its order; empty lines are skipped, `"` quotes cells as in RFC 4180.

    `header` names the columns of a file without header line. `advance` is called with the number of bytes read.

    Raises:
        FileNotFoundError: there is no such file.
        MalformedFileError: a requested column is missing or duplicate, the number of cells of a row differs from the
            header's, a quote is not closed, or bytes are not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted one with the columns {', '.join(column_names)}")
    with path.open("rb") as file:
        rows = _rows(path, _decoded(path, file, separator, advance), separator)
        line, names = (1, list(header)) if header else next(rows, (1, []))
        places = _find_columns(path, line, names, column_names)
        while chunk := list(islice(rows, CHUNK)):
            lines, cells = [line for line, _ in chunk], [cells for _, cells in chunk]
            for line, row in chunk if set(map(len, cells)) != {len(names)} else ():
                if len(row) != len(names):
                    message = f"wanted {len(names)} cells, as in the header, found {len(row)}"
                    raise MalformedFileError(path, line, min(len(row), len(names) + 1), message)
            columns = list(zip(*cells, strict=True))
            yield Chunk(path, {name: columns[places[name]] for name in column_names}, places, lines)


def _decoded(path: Path, file: BinaryIO, separator: str, advance: Advance) -> Iterator[str]:
    """The lines of a file as text."""
    unreported = 0
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            before = line[: error.start].decode("utf-8")
            column = max(1, len(next(csv.reader([before], delimiter=separator))))
            message = f"wanted UTF-8 text, found the bytes {line[error.start : error.end]!r}"
            raise MalformedFileError(path, number, column, message) from error
        unreported += len(line)
        if number % CHUNK == 0:
            advance(unreported)
            unreported = 0
        yield text.removeprefix(BOM) if number == 1 else text
    advance(unreported)


def _rows(path: Path, lines: Iterator[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line on which they begin."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        begin = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise MalformedFileError(path, begin, 1, f"wanted cells as in RFC 4180, found: {error}") from error
        if row is None:
            return
        if row:
            yield begin, row


def _find_columns(path: Path, line: int, names: list[str], column_names: list[str]) -> dict[str, int]:
    for name in column_names:
        if name not in names:
            found = f"found only {', '.join(names)}" if names else "found an empty file"
            raise MalformedFileError(path, line, max(len(names), 1), f"wanted a column {name!r}, {found}")
        if names.count(name) > 1:
            second = names.index(name, names.index(name) + 1)
            raise MalformedFileError(path, line, second + 1, f"column {name!r} is twice in the header")
    return {name: names.index(name) for name in column_names}
