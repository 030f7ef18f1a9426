"""Schemas of delimited files: dataclasses, read from YAML with every key checked."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from interformer.checks import FLOAT32, LARGEST, SEEDS, short_repr, why_no_file_name
from interformer.yaml_files import read_yaml

PARTS = ("train", "valid", "test")
SCHEMAS = resources.files("interformer.data") / "schemas"
YAML_NAMES = {dict: "a mapping", list: "a list", str: "a string", int: "a whole number", float: "a number"}


class SchemaError(ValueError):
    """An invalid schema; the message has the key, the expected value and the value found."""


@dataclass(frozen=True)
class Dense:
    """A column of numbers, unchanged or transformed by `log1p` to `sign(x) log(1 + |x|)`.

    An empty cell counts as the number `empty`, and is an error without one. Numbers are stored in float32: a cell or
    `empty` that is not finite there after the transform is an error.
    """

    column: str
    transform: str = "none"
    empty: float | None = None


@dataclass(frozen=True)
class Ids:
    """A column of ids: one id per cell, or a history of ids. Columns with the same table share its vocabulary."""

    column: str
    table: str


@dataclass(frozen=True)
class Sequences:
    """Columns whose cells hold one history each, aligned event by event.

    Args:
        fields: the columns.
        separator: separator of the events in a cell; an empty cell is an empty history.
        max_length: number of latest events that are kept, at most 2^31 - 1.
        order: order of the events in a cell, `oldest_first` or `newest_first`. Batches hold the oldest first.
        unequal: treatment of a row whose cells differ in length: `error`, or `pad`: they are aligned at their latest
            events, and the shorter ones are padded in front with id 0.
    """

    fields: tuple[Ids, ...]
    separator: str = "^"
    max_length: int = 100
    order: str = "oldest_first"
    unequal: str = "error"


@dataclass(frozen=True)
class Split:
    """The rows of the training file that go to the parts without a file of their own.

    Args:
        by: `rows` (random rows), `users` (random users with all their rows) or `time` (the latest rows; rows of equal
            time stay together, in the part of the first of them).
        valid, test: fractions of the training file; 0 for a part with a file.
        seed: seed of `rows` and `users`, from 0 to 2^32 - 1.
    """

    by: str
    valid: float = 0.0
    test: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class CsvSchema:
    """The description of a data set for `read_csv`.

    Args:
        name: name of the data set, and of its files in a cache: letters, digits and . _ -, not beginning with a dot.
        files: file of each part, at least of `train`; parts without a file come from `split`.
        label: column of 0 and 1.
        user: column of users, for gAUC; a model sees users only if `categorical` names the column too.
        categorical: columns of one id each. In YAML, a bare name uses the table of that name.
        sequences: the histories.
        dense: columns of numbers. In YAML, a bare name means no transform.
        candidate: the columns of `categorical` that describe the candidate item.
        time: column of numbers, for a split by time.
        split: see `files`.
        separator: separator of cells.
        header: names of the columns, for files without header line.
        min_count: ids that occur less often in the training part, in cells and histories together, become id 0, like
            ids that never occur there.
        min_counts: `min_count` of single tables.
    """

    name: str
    files: Mapping[str, str]
    label: str
    user: str
    categorical: tuple[Ids, ...]
    sequences: Sequences
    dense: tuple[Dense, ...] = ()
    candidate: tuple[str, ...] = ()
    time: str | None = None
    split: Split | None = None
    separator: str = ","
    header: tuple[str, ...] | None = None
    min_count: int = 1
    min_counts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        requirement = why_no_file_name(self.name)
        self._require(requirement is None, f"{requirement} for its name", self.name)
        self._check_columns()
        self._check_split()
        for place, value, allowed in (
            ("sequences.order", self.sequences.order, ("oldest_first", "newest_first")),
            ("sequences.unequal", self.sequences.unequal, ("error", "pad")),
            *((f"dense {dense.column!r}: transform", dense.transform, ("none", "log1p")) for dense in self.dense),
        ):
            self._require(value in allowed, f"{place} to be one of {', '.join(allowed)}", value)
        for place, separator in (("separator", self.separator), ("sequences.separator", self.sequences.separator)):
            self._require(len(separator) == 1, f"{place} to be one character", separator)
        self._require(self.separator not in '"\r\n', "separator to be neither a quote nor a line end", self.separator)
        for place, number in (
            ("sequences.max_length", self.sequences.max_length),
            ("min_count", self.min_count),
            *((f"min_counts[{table!r}]", number) for table, number in self.min_counts.items()),
        ):
            self._require(number >= 1, f"{place} to be at least 1", number)
            self._require(number <= LARGEST, f"{place} to be at most {LARGEST}", number)
        for dense in self.dense:
            largest = math.inf if dense.transform == "log1p" else FLOAT32
            holds = dense.empty is None or (math.isfinite(dense.empty) and abs(dense.empty) <= largest)
            self._require(holds, f"dense {dense.column!r}: empty to be finite in float32", dense.empty)

    def _check_columns(self) -> None:
        self._require(bool(self.categorical), "categorical to name at least one column", "none")
        self._require(bool(self.sequences.fields), "sequences.fields to name at least one column", "none")
        names = [ids.column for ids in self.categorical]
        events = [ids.column for ids in self.sequences.fields]
        numbers = [dense.column for dense in self.dense]
        for place, columns in (("categorical", names), ("sequences.fields", events), ("dense", numbers)):
            for name in columns:
                self._require(columns.count(name) == 1, f"{place} to name each column once", name)
        for name in self.candidate:
            self._require(name in names, f"candidate to name columns among {', '.join(names)}", name)
        for table in self.min_counts:
            self._require(table in self.tables, f"min_counts to name tables among {', '.join(self.tables)}", table)

    def _check_split(self) -> None:
        self._require("train" in self.files, "files to name one for train", ", ".join(self.files) or "none")
        for part in self.files:
            self._require(part in PARTS, f"files to be of {', '.join(PARTS)}", part)
        missing = [part for part in PARTS if part not in self.files]
        if self.split is None:
            self._require(not missing, "a split for each part without a file", ", ".join(missing))
            return
        by = ("rows", "users", "time")
        self._require(self.split.by in by, f"split.by to be one of {', '.join(by)}", self.split.by)
        self._require(self.split.by != "time" or self.time is not None, "time to name a column to split by", None)
        for part in ("valid", "test"):
            share = getattr(self.split, part)
            expected = "above 0, since it has no file" if part in missing else "0, since it has a file"
            self._require((0 < share < 1) if part in missing else share == 0, f"split.{part} to be {expected}", share)
        sum_of_shares = self.split.valid + self.split.test
        self._require(sum_of_shares < 1, "split.valid + split.test to be below 1", sum_of_shares)
        self._require(0 <= self.split.seed <= SEEDS, f"split.seed to be 0 to {SEEDS}", self.split.seed)

    def _require(self, condition: bool, expected: str, found: object) -> None:
        if not condition:
            raise SchemaError(f"schema {short_repr(self.name)}: wanted {expected}; found {short_repr(found)}")

    @property
    def tables(self) -> dict[str, int]:
        """The vocabularies, and the minimal number of occurrences of their ids."""
        columns = (*self.categorical, *self.sequences.fields)
        return {ids.table: self.min_counts.get(ids.table, self.min_count) for ids in columns}

    def columns(self) -> list[str]:
        """The columns that are read, without duplicates."""
        time = [self.time] if self.split is not None and self.split.by == "time" and self.time else []
        columns = [self.label, self.user, *time, *(dense.column for dense in self.dense)]
        columns += [ids.column for ids in (*self.categorical, *self.sequences.fields)]
        return list(dict.fromkeys(columns))


# ---------------------------------------------------------------- YAML


def load_schema(schema: CsvSchema | Path | str) -> CsvSchema:
    """A schema given as such, as a YAML file, or as the name of a shipped one (`shipped_schemas`).

    Raises:
        FileNotFoundError: there is no such file and no such name.
        SchemaError: a key is unknown, missing, or has a value of a wrong type; the message names it.
    """
    if isinstance(schema, CsvSchema):
        return schema
    if not isinstance(schema, (str, Path)):
        raise SchemaError(f"schema: wanted a schema, or a string that names one; found {short_repr(schema)}")
    shipped = SCHEMAS / f"{schema}.yaml"
    place: Any = shipped if str(schema) in shipped_schemas() else Path(schema)
    if not place.is_file():
        raise FileNotFoundError(f"{schema}: wanted a YAML file or one of {', '.join(shipped_schemas())}; found neither")
    try:
        plain = read_yaml(place)
    except ValueError as error:
        raise SchemaError(f"{place}: wanted YAML; found {error}") from error
    return parse_schema(plain, str(place))


def shipped_schemas() -> list[str]:
    """Names of the schemas shipped with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in SCHEMAS.iterdir() if file.name.endswith(".yaml"))


def parse_schema(plain: object, place: str = "schema") -> CsvSchema:
    """The schema described by plain values from YAML; `place` begins the messages."""
    return typing.cast(CsvSchema, _parse(CsvSchema, plain, place))


def _parse(kind: Any, plain: object, place: str) -> Any:
    """`plain` as a value of `kind`: a dataclass, a tuple or mapping of such, or a plain type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if plain is None else _parse(arguments[0], plain, place)
    if origin is tuple:
        entries = _of_type(list, plain, place)
        return tuple(_parse(arguments[0], entry, f"{place}[{i}]") for i, entry in enumerate(entries))
    if origin is not None:  # a mapping by names
        return {
            _of_type(str, key, place): _parse(arguments[1], entry, f"{place}.{key}")
            for key, entry in _of_type(dict, plain, place).items()
        }
    if not dataclasses.is_dataclass(kind):
        is_whole = kind is float and isinstance(plain, int) and not isinstance(plain, bool)
        return _as_float(plain, place) if is_whole else _of_type(kind, plain, place)
    if kind in (Ids, Dense) and isinstance(plain, str):
        plain = {"column": plain}
    plain_fields = dict(_of_type(dict, plain, place))
    if kind is Ids:
        plain_fields.setdefault("table", plain_fields.get("column"))
    return _parse_dataclass(kind, plain_fields, place)


def _as_float(plain: Any, place: str) -> float:
    try:
        return float(plain)
    except OverflowError as error:
        raise SchemaError(f"{place}: wanted a number that is finite; found {short_repr(plain)}") from error


def _parse_dataclass(kind: Any, entries: dict[str, Any], place: str) -> Any:
    kinds = typing.get_type_hints(kind)
    for key in entries:
        if key not in kinds:
            raise SchemaError(f"{place}: wanted keys among {', '.join(kinds)}; found {short_repr(key)}")
    for field_ in dataclasses.fields(kind):
        required = field_.default is dataclasses.MISSING and field_.default_factory is dataclasses.MISSING
        if required and field_.name not in entries:
            raise SchemaError(
                f"{place}: wanted the key {field_.name!r}; found only {', '.join(map(str, entries))[:400]}"
            )
    return kind(**{key: _parse(kinds[key], value, f"{place}.{key}") for key, value in entries.items()})


def _of_type(kind: Any, plain: object, place: str) -> Any:
    if not isinstance(plain, kind) or (isinstance(plain, bool) and kind is not bool):
        raise SchemaError(f"{place}: wanted {YAML_NAMES[kind]}; found {short_repr(plain)}")
    return plain
