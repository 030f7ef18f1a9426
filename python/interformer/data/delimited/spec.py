"""What the columns of delimited files mean: dataclasses, read from YAML with every key checked."""

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

from interformer.checks import FLOAT32, LARGEST, SEEDS, shown, why_no_file_name
from interformer.yaml_files import read_yaml

PARTS = ("train", "valid", "test")
SCHEMAS = resources.files("interformer.data") / "schemas"
YAML_NAMES = {dict: "a mapping", list: "a list", str: "a text", int: "a whole number", float: "a number"}


class SchemaError(ValueError):
    """A description of files that does not hold together; the message says where and what was wanted."""


@dataclass(frozen=True)
class Dense:
    """A column of numbers, taken as they are or, by `log1p`, as `sign(x) log(1 + |x|)`.

    An empty cell counts as the number `empty`, and is an error without one. Numbers are kept in float32: one that is
    not finite there, as it is taken, is an error where it stands, in a cell as in `empty`.
    """

    column: str
    transform: str = "none"
    empty: float | None = None


@dataclass(frozen=True)
class Ids:
    """A column of ids: of one id, or of a history's ids. Columns that name one table share its vocabulary."""

    column: str
    table: str


@dataclass(frozen=True)
class Sequences:
    """Columns whose cells hold a history each, aligned event by event.

    Args:
        fields: the columns.
        separator: between the events of a cell; an empty cell is an empty history.
        max_length: the latest so many events are kept, at most 2^31 - 1.
        order: `oldest_first` or `newest_first`: how a cell is written. Batches hold the oldest first.
        unequal: what it means that the cells of one row differ in length: `error`, or `pad`: they are aligned at their
            latest events, and the shorter ones have id 0 in front.
    """

    fields: tuple[Ids, ...]
    separator: str = "^"
    max_length: int = 100
    order: str = "oldest_first"
    unequal: str = "error"


@dataclass(frozen=True)
class Split:
    """Which rows of the training file go to the parts that have no file of their own.

    Args:
        by: `rows` (each row by itself), `users` (all rows of a user together) or `time` (the latest rows; rows of one
            time stay together, in the part where the first of them falls).
        valid, test: shares of the training file; 0 for a part with a file.
        seed: of `rows` and `users`, from 0 to 2^32 - 1.
    """

    by: str
    valid: float = 0.0
    test: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class CsvSchema:
    """What `read_csv` has to know of a data set.

    Args:
        name: of the data set, and of its files in a cache: letters, digits and . _ -, the first no dot.
        files: file of each part, `train` at least; the others come from `split` where they have none.
        label: column of 0 and 1.
        user: column of users, for gAUC; a model sees users only if `categorical` names the column too.
        categorical: columns of one id each. In YAML a bare name has the table of that name.
        sequences: the histories.
        dense: columns of numbers. In YAML a bare name is taken as it is.
        candidate: those of `categorical` that describe the candidate item.
        time: column of numbers, for a split by time.
        split: see `files`.
        separator: between cells.
        header: names of the columns, for files whose first line has none.
        min_count: ids seen less often in the training part, in cells and histories together, are id 0 as are those
            never seen there.
        min_counts: the same for single tables.
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
        wanted = why_no_file_name(self.name)
        self._want(wanted is None, f"{wanted} for its name", self.name)
        self._check_columns()
        self._check_split()
        for place, value, allowed in (
            ("sequences.order", self.sequences.order, ("oldest_first", "newest_first")),
            ("sequences.unequal", self.sequences.unequal, ("error", "pad")),
            *((f"dense {dense.column!r}: transform", dense.transform, ("none", "log1p")) for dense in self.dense),
        ):
            self._want(value in allowed, f"{place} to be one of {', '.join(allowed)}", value)
        for place, separator in (("separator", self.separator), ("sequences.separator", self.sequences.separator)):
            self._want(len(separator) == 1, f"{place} to be one character", separator)
        self._want(self.separator not in '"\r\n', "separator to be no quote and no line's end", self.separator)
        for place, number in (
            ("sequences.max_length", self.sequences.max_length),
            ("min_count", self.min_count),
            *((f"min_counts[{table!r}]", number) for table, number in self.min_counts.items()),
        ):
            self._want(number >= 1, f"{place} to be at least 1", number)
            self._want(number <= LARGEST, f"{place} to be at most {LARGEST}", number)
        for dense in self.dense:
            largest = math.inf if dense.transform == "log1p" else FLOAT32
            holds = dense.empty is None or (math.isfinite(dense.empty) and abs(dense.empty) <= largest)
            self._want(holds, f"dense {dense.column!r}: empty to be finite in float32", dense.empty)

    def _check_columns(self) -> None:
        self._want(bool(self.categorical), "categorical to name at least one column", "none")
        self._want(bool(self.sequences.fields), "sequences.fields to name at least one column", "none")
        names = [ids.column for ids in self.categorical]
        events = [ids.column for ids in self.sequences.fields]
        numbers = [dense.column for dense in self.dense]
        for place, some in (("categorical", names), ("sequences.fields", events), ("dense", numbers)):
            for name in some:
                self._want(some.count(name) == 1, f"{place} to name each column once", name)
        for name in self.candidate:
            self._want(name in names, f"candidate to name columns among {', '.join(names)}", name)
        for table in self.min_counts:
            self._want(table in self.tables, f"min_counts to name tables among {', '.join(self.tables)}", table)

    def _check_split(self) -> None:
        self._want("train" in self.files, "files to name one for train", ", ".join(self.files) or "none")
        for part in self.files:
            self._want(part in PARTS, f"files to be of {', '.join(PARTS)}", part)
        missing = [part for part in PARTS if part not in self.files]
        if self.split is None:
            self._want(not missing, "a split for each part without a file", ", ".join(missing))
            return
        by = ("rows", "users", "time")
        self._want(self.split.by in by, f"split.by to be one of {', '.join(by)}", self.split.by)
        self._want(self.split.by != "time" or self.time is not None, "time to name a column to split by", None)
        for part in ("valid", "test"):
            share = getattr(self.split, part)
            wanted = "above 0, for it has no file" if part in missing else "0, for it has a file"
            self._want((0 < share < 1) if part in missing else share == 0, f"split.{part} to be {wanted}", share)
        both = self.split.valid + self.split.test
        self._want(both < 1, "split.valid + split.test to be below 1", both)
        self._want(0 <= self.split.seed <= SEEDS, f"split.seed to be 0 to {SEEDS}", self.split.seed)

    def _want(self, holds: bool, wanted: str, found: object) -> None:
        if not holds:
            raise SchemaError(f"schema {shown(self.name)}: wanted {wanted}; found {shown(found)}")

    @property
    def tables(self) -> dict[str, int]:
        """The vocabularies, and how often an id must be seen to have one of its own."""
        columns = (*self.categorical, *self.sequences.fields)
        return {ids.table: self.min_counts.get(ids.table, self.min_count) for ids in columns}

    def columns(self) -> list[str]:
        """Every column that is read, each once."""
        time = [self.time] if self.split is not None and self.split.by == "time" and self.time else []
        some = [self.label, self.user, *time, *(dense.column for dense in self.dense)]
        some += [ids.column for ids in (*self.categorical, *self.sequences.fields)]
        return list(dict.fromkeys(some))


# ---------------------------------------------------------------- YAML


def load_schema(schema: CsvSchema | Path | str) -> CsvSchema:
    """A schema as it is, from a YAML file, or by the name of one that is shipped (`shipped_schemas`).

    Raises:
        FileNotFoundError: no such file and no such name.
        SchemaError: naming the key that is unknown, missing, or not of its kind.
    """
    if isinstance(schema, CsvSchema):
        return schema
    if not isinstance(schema, (str, Path)):
        raise SchemaError(f"schema: wanted a schema, or a text that names one; found {shown(schema)}")
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
    """Names of the schemas that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in SCHEMAS.iterdir() if file.name.endswith(".yaml"))


def parse_schema(plain: object, place: str = "schema") -> CsvSchema:
    """The schema that YAML's plain values describe; `place` begins the messages."""
    return typing.cast(CsvSchema, _parse(CsvSchema, plain, place))


def _parse(kind: Any, plain: object, place: str) -> Any:
    """`plain` as a value of `kind`: a dataclass, a tuple or mapping of such, or a plain type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if plain is None else _parse(inner[0], plain, place)
    if origin is tuple:
        return tuple(_parse(inner[0], one, f"{place}[{i}]") for i, one in enumerate(_of(list, plain, place)))
    if origin is not None:  # a mapping by names
        return {
            _of(str, key, place): _parse(inner[1], one, f"{place}.{key}")
            for key, one in _of(dict, plain, place).items()
        }
    if not dataclasses.is_dataclass(kind):
        whole = kind is float and isinstance(plain, int) and not isinstance(plain, bool)
        return _as_float(plain, place) if whole else _of(kind, plain, place)
    if kind in (Ids, Dense) and isinstance(plain, str):
        plain = {"column": plain}
    given = dict(_of(dict, plain, place))
    if kind is Ids:
        given.setdefault("table", given.get("column"))
    return _parse_dataclass(kind, given, place)


def _as_float(plain: Any, place: str) -> float:
    try:
        return float(plain)
    except OverflowError as error:
        raise SchemaError(f"{place}: wanted a number that is finite; found {shown(plain)}") from error


def _parse_dataclass(kind: Any, given: dict[str, Any], place: str) -> Any:
    kinds = typing.get_type_hints(kind)
    for key in given:
        if key not in kinds:
            raise SchemaError(f"{place}: wanted keys among {', '.join(kinds)}; found {shown(key)}")
    for needed in dataclasses.fields(kind):
        default = needed.default is dataclasses.MISSING and needed.default_factory is dataclasses.MISSING
        if default and needed.name not in given:
            raise SchemaError(f"{place}: wanted the key {needed.name!r}; found only {', '.join(map(str, given))[:400]}")
    return kind(**{key: _parse(kinds[key], value, f"{place}.{key}") for key, value in given.items()})


def _of(kind: Any, plain: object, place: str) -> Any:
    if not isinstance(plain, kind) or (isinstance(plain, bool) and kind is not bool):
        raise SchemaError(f"{place}: wanted {YAML_NAMES[kind]}; found {shown(plain)}")
    return plain
