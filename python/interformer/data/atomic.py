"""Tables in RecBole's atomic form: tab-separated, with a header of `name:type`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interformer.checks import finite_in_float32, shown
from interformer.data.errors import MalformedFileError


@dataclass(frozen=True)
class Table:
    """Columns of a file by name, each a list over its rows, with what is needed to point at a bad cell."""

    path: Path
    columns: dict[str, list[Any]]
    places: dict[str, int]
    lines: list[int]

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.lines)

    def bad(self, row: int, name: str, message: str) -> MalformedFileError:
        """The error that says what is wrong with the cell of column `name` in row `row`."""
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


def read_atomic(path: Path, wanted: dict[str, str]) -> Table:
    """Columns `wanted = {name: type}` of the table at `path`, in the file's order.

    Types are `token` (str), `token_seq` (list of str, split at blanks), `float`, `float_seq`; empty lines are skipped
    and columns that are not wanted are not parsed. Line 1 is the header.

    Raises:
        FileNotFoundError: there is no such file.
        MalformedFileError: with line and column (1-based, counted in tab-separated cells) of what is wrong: header,
            number of cells, a number that is none or not finite in float32, bytes that are not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted a table with the columns {', '.join(wanted)}")
    lines = path.read_bytes().split(b"\n")
    header = _cells(path, 1, lines[0])
    places = _find_columns(path, header, wanted)
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    rows: list[int] = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        cells = _cells(path, number, line)
        if len(cells) != len(header):
            message = f"wanted {len(header)} tab-separated cells, as in the header, found {len(cells)}"
            raise MalformedFileError(path, number, min(len(cells), len(header) + 1), message)
        rows.append(number)
        for name, kind in wanted.items():
            columns[name].append(_parse(path, number, places[name], name, kind, cells[places[name]]))
    return Table(path, columns, places, rows)


def _cells(path: Path, number: int, line: bytes) -> list[str]:
    cells = []
    for column, cell in enumerate(line.rstrip(b"\r").split(b"\t"), 1):
        try:
            cells.append(cell.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise MalformedFileError(
                path, number, column, f"wanted UTF-8 text, found the bytes {shown(cell)}"
            ) from error
    return cells


def _find_columns(path: Path, header: list[str], wanted: dict[str, str]) -> dict[str, int]:
    found = {}
    for column, cell in enumerate(header, 1):
        name, colon, kind = cell.partition(":")
        if not colon or kind not in _PARSERS:
            wanted_cell = f"wanted a header cell name:type with a type of {', '.join(_PARSERS)}"
            raise MalformedFileError(path, 1, column, f"{wanted_cell}; found {shown(cell)}")
        if name in found:
            raise MalformedFileError(path, 1, column, f"column {name!r} stands twice in the header")
        if wanted.get(name, kind) != kind:
            raise MalformedFileError(path, 1, column, f"column {name!r} must be of type {wanted[name]}, found {kind}")
        found[name] = column - 1
    for name in wanted:
        if name not in found:
            raise MalformedFileError(path, 1, len(header), f"wanted a column {name!r}, found only {', '.join(found)}")
    return found


def _parse(path: Path, number: int, place: int, name: str, kind: str, cell: str) -> Any:
    try:
        return _PARSERS[kind](cell)
    except ValueError as error:
        raise MalformedFileError(
            path, number, place + 1, f"column {name!r} wanted a {kind}, found {shown(cell)}"
        ) from error
