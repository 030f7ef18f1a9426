"""Conversion of text files to compact arrays on disk: each file is read once, with provisional ids.

While reading, each table numbers its texts in order of appearance, so that only the vocabularies keep text. The counts
of the training part then decide which ids remain, and the arrays are rewritten with the final ids. Memory holds the
vocabularies, one chunk, and a few numbers per row.

Axes: `N` rows of all files, `V` events of all rows, `k` fields of an event.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interformer.checks import short_repr
from interformer.data.clicks import check_not_empty
from interformer.data.delimited.rows import Advance, Chunk, read_chunks
from interformer.data.delimited.spec import PARTS, CsvSchema, Dense
from interformer.data.delimited.store import Target, bytes_of
from interformer.files import naming
from interformer.schema import Field, Schema

UNKNOWN = 0  # the id of empty, rare and unseen texts
STEP = 1 << 16  # rows copied at a time
Ints = NDArray[np.int64]


class Numbering(dict[str, int]):
    """A dictionary that numbers texts from 1 as they are looked up; the empty text is unknown."""

    def __init__(self) -> None:
        super().__init__({"": UNKNOWN})

    def __missing__(self, text: str) -> int:
        number = self[text] = len(self)
        return number


class RawArray:
    """A growing `[rows, width]` array in an unnamed temporary file, which vanishes with the process."""

    def __init__(self, folder: Path | None, kind: type[np.generic], width: int) -> None:
        self.kind, self.width = kind, width
        self.folder = folder or Path(tempfile.gettempdir())
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the file lives as long as the array)
        self.rows = 0

    def append(self, values: NDArray[Any]) -> None:
        self.rows += len(values)
        if values.size:
            with naming(self.folder):
                self.file.write(bytes_of(values, self.kind))

    def finish(self) -> NDArray[Any]:
        """The memory-mapped array; nothing can be appended afterwards."""
        with naming(self.folder):
            self.file.flush()
        if not self.width or not self.rows:
            return np.empty((self.rows, self.width), self.kind)
        return np.memmap(self.file, self.kind, "r", shape=(self.rows, self.width))

    def close(self) -> None:
        """Close the file; mapped arrays stay valid."""
        with contextlib.suppress(OSError):  # A full disk has been reported by a write already.
            self.file.close()


class Recorder:
    """The arrays of all files, with provisional ids."""

    def __init__(self, schema: CsvSchema, folder: Path | None, max_length: int) -> None:
        self.schema, self.max_length = schema, max_length
        self.numbering = {table: Numbering() for table in schema.tables}
        self.users = Numbering()
        self.rows = dict.fromkeys(PARTS, 0)
        self.by_time = schema.split is not None and schema.split.by == "time"
        widths: dict[str, tuple[type[np.generic], int]] = {
            "dense": (np.float32, len(schema.dense)),
            "categorical": (np.int32, len(schema.categorical)),
            "events": (np.int32, len(schema.sequences.fields)),
            "length": (np.int32, 1),
            "label": (np.float32, 1),
            "user": (np.int32, 1),
            "time": (np.float64, int(self.by_time)),
        }
        self.arrays = {name: RawArray(folder, *kind_and_width) for name, kind_and_width in widths.items()}

    def record(self, part: str, chunk: Chunk) -> None:
        """Append the rows of `chunk`, which come from the file of `part`."""
        schema = self.schema
        self.rows[part] += len(chunk.lines)
        self.arrays["label"].append(chunk.labels(schema.label))
        self.arrays["user"].append(self._users(chunk))
        if self.by_time and schema.time:
            self.arrays["time"].append(chunk.numbers(schema.time))
        columns = []
        for dense in schema.dense:
            values = chunk.numbers(dense.column, dense.empty)
            columns.append(_transformed(chunk, dense, values))
        self.arrays["dense"].append(np.stack(columns, 1) if columns else np.empty((len(chunk.lines), 0)))
        ids = [self._numbers(c.table, chunk.columns[c.column], len(chunk.lines)) for c in schema.categorical]
        self.arrays["categorical"].append(np.stack(ids, 1))
        events, length = self._histories(chunk)
        self.arrays["events"].append(events)
        self.arrays["length"].append(length)

    def _users(self, chunk: Chunk) -> NDArray[np.int32]:
        cells = chunk.columns[self.schema.user]
        if "" in cells:
            raise chunk.cell_error(cells.index(""), self.schema.user, "wanted a user, found an empty cell")
        return np.fromiter(map(self.users.__getitem__, cells), np.int32, len(cells))

    def _numbers(self, table: str, texts: Any, count: int) -> NDArray[np.int32]:
        return np.fromiter(map(self.numbering[table].__getitem__, texts), np.int32, count)

    def _histories(self, chunk: Chunk) -> tuple[NDArray[np.int32], Ints]:
        """The events of all rows, oldest first, and the number of events of each row."""
        sequences = self.schema.sequences
        split = {ids.column: _split(chunk.columns[ids.column], sequences.separator) for ids in sequences.fields}
        lengths = {name: np.fromiter(map(len, texts), np.int64, len(texts)) for name, texts in split.items()}
        if sequences.unequal == "error":
            _check_equal(chunk, lengths)
        kept = {name: np.minimum(length, self.max_length) for name, length in lengths.items()}
        longest = np.maximum.reduce(list(kept.values()))
        end = np.cumsum(longest)
        events = np.full((int(end[-1]), len(sequences.fields)), UNKNOWN, np.int32)
        for column, ids in enumerate(sequences.fields):
            length, total = kept[ids.column], int(kept[ids.column].sum())
            texts = (_latest(texts, sequences.order, self.max_length) for texts in split[ids.column])
            # The texts of this column follow one another; `shift` moves each row's to the end of its events.
            shift = np.repeat(end - np.cumsum(length), length)
            events[np.arange(total) + shift, column] = self._numbers(ids.table, chain.from_iterable(texts), total)
        return events, longest

    def finish(self) -> dict[str, NDArray[Any]]:
        """All recorded arrays, memory-mapped."""
        return {name: array.finish() for name, array in self.arrays.items()}

    def close(self) -> None:
        for array in self.arrays.values():
            array.close()


def _transformed(chunk: Chunk, dense: Dense, values: NDArray[np.float64]) -> NDArray[np.float32]:
    """The transformed column in float32; a number that is not finite there is an error."""
    transformed = np.sign(values) * np.log1p(np.abs(values)) if dense.transform == "log1p" else values
    with np.errstate(over="ignore"):
        rounded = transformed.astype(np.float32)
    for row in np.flatnonzero(~np.isfinite(rounded)).tolist():
        cell = short_repr(chunk.columns[dense.column][row])
        raise chunk.cell_error(row, dense.column, f"wanted a number that is finite in float32, found {cell}")
    return rounded


def _split(cells: Any, separator: str) -> list[list[str]]:
    return [cell.split(separator) if cell else [] for cell in cells]


def _latest(texts: list[str], order: str, max_length: int) -> list[str]:
    """The latest `max_length` events of a history, oldest first."""
    return texts[-max_length:] if order == "oldest_first" else texts[:max_length][::-1]


def _check_equal(chunk: Chunk, lengths: dict[str, Ints]) -> None:
    first, *other_columns = lengths
    for name in other_columns:
        for row in np.flatnonzero(lengths[name] != lengths[first]).tolist():
            message = f"wanted {lengths[first][row]} events, as in column {first!r}, found {lengths[name][row]}"
            raise chunk.cell_error(row, name, message)


# ---------------------------------------------------------------- parts and vocabularies


def assign_parts(schema: CsvSchema, rows: dict[str, int], user: Ints, time: NDArray[np.float64]) -> NDArray[np.uint8]:
    """0, 1 or 2 (train, valid, test) for each of the `N` rows, which are ordered by file."""
    part = np.repeat(np.arange(len(PARTS), dtype=np.uint8), [rows[name] for name in PARTS])
    split, n = schema.split, rows["train"]
    if split is not None:
        if split.by == "time":
            quantile = np.searchsorted(np.sort(time[:n]), time[:n], side="left") / max(n, 1)
        else:
            rng = np.random.default_rng(split.seed)
            quantile = rng.random(n) if split.by == "rows" else rng.random(int(user[:n].max(initial=0)) + 1)[user[:n]]
        part[:n] = (quantile >= 1 - split.valid - split.test) * 1 + (quantile >= 1 - split.test)
    return part


def _in_steps(total: int) -> Iterator[slice]:
    for start in range(0, total, STEP):
        yield slice(start, min(start + STEP, total))


def final_ids(recorder: Recorder, raw: dict[str, NDArray[Any]], trains: NDArray[np.bool_]) -> dict[str, Ints]:
    """The final id of each provisional id, by table: from 1 on if it is frequent enough in training, else unknown."""
    schema = recorder.schema
    count = {table: np.zeros(len(numbering), np.int64) for table, numbering in recorder.numbering.items()}
    ends = np.concatenate(([0], np.cumsum(raw["length"][:, 0], dtype=np.int64)))
    for rows in _in_steps(len(trains)):
        chosen = trains[rows]
        cells = raw["categorical"][rows][chosen]
        events = raw["events"][ends[rows.start] : ends[rows.stop]][np.repeat(chosen, raw["length"][rows, 0])]
        for columns, values in ((schema.categorical, cells), (schema.sequences.fields, events)):
            for column, ids in enumerate(columns):
                occurrences = np.bincount(values[:, column])
                count[ids.table][: len(occurrences)] += occurrences
    final = {}
    for table, min_count in schema.tables.items():
        kept = count[table] >= min_count
        kept[UNKNOWN] = False
        final[table] = np.where(kept, np.cumsum(kept), UNKNOWN)
    return final


# ---------------------------------------------------------------- the conversion


def encode(schema: CsvSchema, directory: Path, target: Target, max_length: int, advance: Advance) -> dict[str, Any]:
    """Write the arrays of the files in `directory` to `target`; returns the model's schema and the parts' sizes.

    Rows are ordered by part, so that a part is a slice of the arrays.
    """
    recorder = Recorder(schema, target.folder, max_length)
    with contextlib.closing(recorder):
        for part in PARTS:
            if part in schema.files:
                path = directory / schema.files[part]
                for chunk in read_chunks(path, schema.columns(), schema.separator, schema.header, advance):
                    recorder.record(part, chunk)
        raw = recorder.finish()
    part_of = assign_parts(schema, recorder.rows, raw["user"][:, 0], raw["time"].reshape(-1))
    sizes = np.bincount(part_of, minlength=len(PARTS)).tolist()
    check_not_empty(directory, schema.name, dict(zip(PARTS, sizes, strict=True)))
    final = final_ids(recorder, raw, part_of == 0)
    _write(schema, target, raw, np.argsort(part_of, kind="stable"), final)
    tables = {table: int(ids.max()) + 1 for table, ids in final.items()}
    return {"schema": _model_schema(schema, tables).to_dict(), "sizes": sizes}


def _write(
    schema: CsvSchema, target: Target, raw: dict[str, NDArray[Any]], order: Ints, final: dict[str, Ints]
) -> None:
    last = np.cumsum(raw["length"][:, 0], dtype=np.int64)
    rows = {"label": raw["label"][:, 0], "user": raw["user"][:, 0], "last": last, "first": last - raw["length"][:, 0]}
    for name, values in {**rows, "dense": raw["dense"]}.items():
        out = target.array(name, values.shape)
        for step in _in_steps(len(order)):
            out.append(values[order[step]])
        out.close()
    for name, columns, chosen in (
        ("categorical", schema.categorical, order),
        ("events", schema.sequences.fields, None),
    ):
        values = raw[name]
        out = target.array(name, values.shape)
        for step in _in_steps(len(values)):
            provisional = values[step if chosen is None else chosen[step]]
            out.append(np.stack([final[ids.table][provisional[:, i]] for i, ids in enumerate(columns)], 1))
        out.close()


def _model_schema(schema: CsvSchema, tables: dict[str, int]) -> Schema:
    return Schema(
        tables,
        tuple(dense.column for dense in schema.dense),
        tuple(Field(ids.column, ids.table) for ids in schema.categorical),
        tuple(Field(ids.column, ids.table) for ids in schema.sequences.fields),
        schema.candidate,
    )
