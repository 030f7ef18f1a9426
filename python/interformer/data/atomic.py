"""Tables in RecBole's atomic form: tab-separated, with a header of `name:type`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interformer.checks import finite_in_float32, short_repr
from interformer.data.errors import MalformedFileError


@dataclass(frozen=True)
class Table:
    """Columns of a file by name, each a list over its rows, with the positions of cells for error messages."""

    path: Path
    columns: dict[str, list[Any]]
    places: dict[str, int]
    lines: list[int]

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.lines)

    def cell_error(self, row: int, name: str, message: str) -> MalformedFileError:
        """The error for the cell of column `name` in row `row`, with its position in the file."""
        return MalformedFileError(self.path, self.lines[row], self.places[name] + 1, f"column {name!r} {message}")


def _finite(text: str) -> float:
    value = float(text)
    if not finite_in_float32(value):
        raise ValueError(text)
    return value


_PARSERS: dict[str, Callable[[str], Any]] = {
    "token": str,
    "token_seq": str.split,
    "float": _finite,
    "float_seq": lambda text: [_finite(x) for x in text.split()],
}


def read_atomic(path: Path, kinds: dict[str, str]) -> Table:
    """The columns `kinds = {name: type}` of the table at `path`, in the file's row order.

    Types are `token` (str), `token_seq` (list of str, split at blanks), `float`, `float_seq`. Empty lines are skipped,
    and other columns are not parsed. Line 1 is the header.

    Raises:
        FileNotFoundError: there is no such file.
        MalformedFileError: a wrong header or number of cells, a cell that is not a number or not finite in float32, or
            bytes that are not UTF-8; with line and column (from 1, counted in tab-separated cells).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted a table with the columns {', '.join(kinds)}")
    lines = path.read_bytes().split(b"\n")
    header = _cells(path, 1, lines[0])
    places = _find_columns(path, header, kinds)
    columns: dict[str, list[Any]] = {name: [] for name in kinds}
    rows: list[int] = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        cells = _cells(path, number, line)
        if len(cells) != len(header):
            message = f"wanted {len(header)} tab-separated cells, as in the header, found {len(cells)}"
            raise MalformedFileError(path, number, min(len(cells), len(header) + 1), message)
        rows.append(number)
        for name, kind in kinds.items():
            columns[name].append(_parse(path, number, places[name], name, kind, cells[places[name]]))
    return Table(path, columns, places, rows)


def _cells(path: Path, number: int, line: bytes) -> list[str]:
    cells = []
    for column, cell in enumerate(line.rstrip(b"\r").split(b"\t"), 1):
        try:
            cells.append(cell.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise MalformedFileError(
                path, number, column, f"wanted UTF-8 text, found the bytes {short_repr(cell)}"
            ) from error
    return cells


def _find_columns(path: Path, header: list[str], kinds: dict[str, str]) -> dict[str, int]:
    places: dict[str, int] = {}
    for column, cell in enumerate(header, 1):
        name, colon, kind = cell.partition(":")
        if not colon or kind not in _PARSERS:
            expected = f"wanted a header cell name:type with a type of {', '.join(_PARSERS)}"
            raise MalformedFileError(path, 1, column, f"{expected}; found {short_repr(cell)}")
        if name in places:
            raise MalformedFileError(path, 1, column, f"column {name!r} is twice in the header")
        if kinds.get(name, kind) != kind:
            raise MalformedFileError(path, 1, column, f"column {name!r} must be of type {kinds[name]}, found {kind}")
        places[name] = column - 1
    for name in kinds:
        if name not in places:
            raise MalformedFileError(path, 1, len(header), f"wanted a column {name!r}, found only {', '.join(places)}")
    return places


def _parse(path: Path, number: int, place: int, name: str, kind: str, cell: str) -> Any:
    try:
        return _PARSERS[kind](cell)
    except ValueError as error:
        raise MalformedFileError(
            path, number, place + 1, f"column {name!r} wanted a {kind}, found {short_repr(cell)}"
        ) from error
