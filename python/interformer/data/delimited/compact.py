"""From text to compact arrays on disk: every file is read once, ids are given on the way and settled afterwards.

While reading, each table numbers its texts as they come, so that no text is kept but the vocabularies. The counts of
the training part then say which of them stay, and the arrays are written anew with the ids that are left. In memory are
the vocabularies, one chunk, and a few numbers for each row.

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

from interformer.checks import shown
from interformer.data.clicks import want_rows
from interformer.data.delimited.rows import Advance, Chunk, read_chunks
from interformer.data.delimited.spec import PARTS, CsvSchema, Dense
from interformer.data.delimited.store import Target, bytes_of
from interformer.files import naming
from interformer.schema import Field, Schema

UNKNOWN = 0  # the id of empty, rare and unseen texts
STEP = 1 << 16  # rows copied at a time
Ints = NDArray[np.int64]


class Numbering(dict[str, int]):
    """Texts numbered from 1 as they are asked for; the empty one is unknown."""

    def __init__(self) -> None:
        super().__init__({"": UNKNOWN})

    def __missing__(self, text: str) -> int:
        number = self[text] = len(self)
        return number


class RawArray:
    """A `[rows, width]` array that grows in a file without a name, which is gone with the process."""

    def __init__(self, folder: Path | None, kind: type[np.generic], width: int) -> None:
        self.kind, self.width = kind, width
        self.place = folder or Path(tempfile.gettempdir())
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as the array)
        self.rows = 0

    def append(self, values: NDArray[Any]) -> None:
        self.rows += len(values)
        if values.size:
            with naming(self.place):
                self.file.write(bytes_of(values, self.kind))

    def finish(self) -> NDArray[Any]:
        """What was written, mapped; nothing can be appended any more."""
        with naming(self.place):
            self.file.flush()
        if not self.width or not self.rows:
            return np.empty((self.rows, self.width), self.kind)
        return np.memmap(self.file, self.kind, "r", shape=(self.rows, self.width))

    def close(self) -> None:
        """What is mapped stays until it is let go."""
        with contextlib.suppress(OSError):  # of a full disk, which was told already
            self.file.close()


class Recorder:
    """The arrays of all files, with the numbers that texts have while reading."""

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
        self.arrays = {name: RawArray(folder, *of) for name, of in widths.items()}

    def record(self, part: str, chunk: Chunk) -> None:
        """Appends the rows of `chunk`, which come from the file of `part`."""
        schema = self.schema
        self.rows[part] += len(chunk.lines)
        self.arrays["label"].append(chunk.labels(schema.label))
        self.arrays["user"].append(self._users(chunk))
        if self.by_time and schema.time:
            self.arrays["time"].append(chunk.numbers(schema.time))
        columns = []
        for dense in schema.dense:
            values = chunk.numbers(dense.column, dense.empty)
            columns.append(_kept(chunk, dense, values))
        self.arrays["dense"].append(np.stack(columns, 1) if columns else np.empty((len(chunk.lines), 0)))
        ids = [self._numbers(c.table, chunk.columns[c.column], len(chunk.lines)) for c in schema.categorical]
        self.arrays["categorical"].append(np.stack(ids, 1))
        events, length = self._histories(chunk)
        self.arrays["events"].append(events)
        self.arrays["length"].append(length)

    def _users(self, chunk: Chunk) -> NDArray[np.int32]:
        cells = chunk.columns[self.schema.user]
        if "" in cells:
            raise chunk.bad(cells.index(""), self.schema.user, "wanted a user, found an empty cell")
        return np.fromiter(map(self.users.__getitem__, cells), np.int32, len(cells))

    def _numbers(self, table: str, texts: Any, count: int) -> NDArray[np.int32]:
        return np.fromiter(map(self.numbering[table].__getitem__, texts), np.int32, count)

    def _histories(self, chunk: Chunk) -> tuple[NDArray[np.int32], Ints]:
        """Events of the rows one after the other, oldest first, and how many each row has."""
        how = self.schema.sequences
        split = {ids.column: _split(chunk.columns[ids.column], how.separator) for ids in how.fields}
        lengths = {name: np.fromiter(map(len, texts), np.int64, len(texts)) for name, texts in split.items()}
        if how.unequal == "error":
            _want_equal(chunk, lengths)
        kept = {name: np.minimum(length, self.max_length) for name, length in lengths.items()}
        longest = np.maximum.reduce(list(kept.values()))
        end = np.cumsum(longest)
        events = np.full((int(end[-1]), len(how.fields)), UNKNOWN, np.int32)
        for place, ids in enumerate(how.fields):
            length, total = kept[ids.column], int(kept[ids.column].sum())
            texts = (_latest(texts, how.order, self.max_length) for texts in split[ids.column])
            begin = np.repeat(end - np.cumsum(length), length)  # of the row here, less where it begins among its own
            events[np.arange(total) + begin, place] = self._numbers(ids.table, chain.from_iterable(texts), total)
        return events, longest

    def finish(self) -> dict[str, NDArray[Any]]:
        """All that was recorded, mapped."""
        return {name: array.finish() for name, array in self.arrays.items()}

    def close(self) -> None:
        for array in self.arrays.values():
            array.close()


def _kept(chunk: Chunk, dense: Dense, values: NDArray[np.float64]) -> NDArray[np.float32]:
    """A column as it is kept; a number that float32 has no room for is an error."""
    kept = np.sign(values) * np.log1p(np.abs(values)) if dense.transform == "log1p" else values
    with np.errstate(over="ignore"):
        short = kept.astype(np.float32)
    for row in np.flatnonzero(~np.isfinite(short)).tolist():
        cell = chunk.columns[dense.column][row]
        raise chunk.bad(row, dense.column, f"wanted a number that is finite in float32, found {shown(cell)}")
    return short


def _split(cells: Any, separator: str) -> list[list[str]]:
    return [cell.split(separator) if cell else [] for cell in cells]


def _latest(texts: list[str], order: str, most: int) -> list[str]:
    """The latest `most` of a history, oldest first."""
    return texts[-most:] if order == "oldest_first" else texts[:most][::-1]


def _want_equal(chunk: Chunk, lengths: dict[str, Ints]) -> None:
    first, *others = lengths
    for name in others:
        for row in np.flatnonzero(lengths[name] != lengths[first]).tolist():
            wanted = f"wanted {lengths[first][row]} events, as in column {first!r}, found {lengths[name][row]}"
            raise chunk.bad(row, name, wanted)


# ---------------------------------------------------------------- parts and vocabularies


def assign_parts(schema: CsvSchema, rows: dict[str, int], user: Ints, time: NDArray[np.float64]) -> NDArray[np.uint8]:
    """0, 1 or 2 (train, valid, test) for each of the `N` rows, which come file by file."""
    part = np.repeat(np.arange(len(PARTS), dtype=np.uint8), [rows[name] for name in PARTS])
    how, own = schema.split, rows["train"]
    if how is not None:
        if how.by == "time":
            place = np.searchsorted(np.sort(time[:own]), time[:own], side="left") / max(own, 1)
        else:
            rng = np.random.default_rng(how.seed)
            place = rng.random(own) if how.by == "rows" else rng.random(int(user[:own].max(initial=0)) + 1)[user[:own]]
        part[:own] = (place >= 1 - how.valid - how.test) * 1 + (place >= 1 - how.test)
    return part


def _in_steps(total: int) -> Iterator[slice]:
    for start in range(0, total, STEP):
        yield slice(start, min(start + STEP, total))


def settle_ids(recorder: Recorder, raw: dict[str, NDArray[Any]], trains: NDArray[np.bool_]) -> dict[str, Ints]:
    """For each table the ids of its numbers: 1 and up for those seen often enough in training, else unknown."""
    schema = recorder.schema
    count = {table: np.zeros(len(known), np.int64) for table, known in recorder.numbering.items()}
    ends = np.concatenate(([0], np.cumsum(raw["length"][:, 0], dtype=np.int64)))
    for rows in _in_steps(len(trains)):
        chosen = trains[rows]
        cells = raw["categorical"][rows][chosen]
        events = raw["events"][ends[rows.start] : ends[rows.stop]][np.repeat(chosen, raw["length"][rows, 0])]
        for columns, values in ((schema.categorical, cells), (schema.sequences.fields, events)):
            for place, ids in enumerate(columns):
                some = np.bincount(values[:, place])
                count[ids.table][: len(some)] += some
    settled = {}
    for table, least in schema.tables.items():
        kept = count[table] >= least
        kept[UNKNOWN] = False
        settled[table] = np.where(kept, np.cumsum(kept), UNKNOWN)
    return settled


# ---------------------------------------------------------------- the whole


def encode(schema: CsvSchema, directory: Path, target: Target, max_length: int, advance: Advance) -> dict[str, Any]:
    """Writes the arrays of the files in `directory` to `target`; returns what else is needed to make clicks of them.

    Row arrays come part by part, so that a part is a slice of them.
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
    want_rows(directory, schema.name, dict(zip(PARTS, sizes, strict=True)))
    settled = settle_ids(recorder, raw, part_of == 0)
    _write(schema, target, raw, np.argsort(part_of, kind="stable"), settled)
    tables = {table: int(ids.max()) + 1 for table, ids in settled.items()}
    return {"schema": _model_schema(schema, tables).to_dict(), "sizes": sizes}


def _write(
    schema: CsvSchema, target: Target, raw: dict[str, NDArray[Any]], order: Ints, settled: dict[str, Ints]
) -> None:
    last = np.cumsum(raw["length"][:, 0], dtype=np.int64)
    rows = {"label": raw["label"][:, 0], "user": raw["user"][:, 0], "last": last, "first": last - raw["length"][:, 0]}
    for name, values in {**rows, "dense": raw["dense"]}.items():
        out = target.array(name, values.shape)
        for some in _in_steps(len(order)):
            out.append(values[order[some]])
        out.close()
    for name, columns, chosen in (
        ("categorical", schema.categorical, order),
        ("events", schema.sequences.fields, None),
    ):
        values = raw[name]
        out = target.array(name, values.shape)
        for some in _in_steps(len(values)):
            numbers = values[some if chosen is None else chosen[some]]
            out.append(np.stack([settled[ids.table][numbers[:, place]] for place, ids in enumerate(columns)], 1))
        out.close()


def _model_schema(schema: CsvSchema, tables: dict[str, int]) -> Schema:
    return Schema(
        tables,
        tuple(dense.column for dense in schema.dense),
        tuple(Field(ids.column, ids.table) for ids in schema.categorical),
        tuple(Field(ids.column, ids.table) for ids in schema.sequences.fields),
        schema.candidate,
    )
