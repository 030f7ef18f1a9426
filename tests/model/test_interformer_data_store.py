"""The cache of `read_csv`, and the YAML of schemas."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path

import pytest
import torch
from delimited_tables import layout_rows, write_table
from interformer.data import MalformedFileError, SchemaError, Splits, delimited, load_schema, read_csv
from interformer.data.delimited.spec import Dense, Ids, Sequences, Split, parse_schema

LAYOUT = "taobao_ad_x1"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_table(tmp_path / "train.csv", layout_rows(LAYOUT, 0, 60))
    write_table(tmp_path / "test.csv", layout_rows(LAYOUT, 1, 10))
    return tmp_path


def _read(directory: Path, **options: object) -> Splits:
    schema = dataclasses.replace(load_schema(LAYOUT), min_count=2)
    return read_csv(directory, schema, cache=directory / "cache", **options)  # type: ignore[arg-type]


def _same(first: Splits, second: Splits) -> bool:
    if first.schema != second.schema:
        return False
    arrays = ("dense", "categorical", "events", "first", "last", "label", "user")
    pairs = zip(first.parts().values(), second.parts().values(), strict=True)
    return all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in arrays)


def _forbid(*_: object) -> None:
    raise AssertionError("the files must not be read again")


def test_a_second_reading_takes_the_cache(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _read(directory)
    monkeypatch.setattr(delimited, "encode", _forbid)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = _read(directory)
    assert _same(first, second)
    assert second.train.events.dtype == second.train.categorical.dtype == torch.int32
    assert second.train.events.data_ptr() == second.test.events.data_ptr()


def test_the_cache_changes_nothing(directory: Path) -> None:
    schema = dataclasses.replace(load_schema(LAYOUT), min_count=2)
    assert _same(_read(directory), read_csv(directory, schema))


def test_what_is_loaded_can_be_written_without_harm(directory: Path) -> None:
    first = _read(directory)
    expected = first.train.label.clone()
    first.train.label.fill_(7)
    assert torch.equal(_read(directory).train.label, expected)


def test_each_schema_and_length_has_its_own_place(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = _read(directory), _read(directory, max_history=2)
    assert short.train.lengths.max() == 2 < long.train.lengths.max()
    other_layout = read_csv(directory, LAYOUT, cache=directory / "cache")
    assert other_layout.schema != long.schema
    assert len(list((directory / "cache").iterdir())) == 3
    monkeypatch.setattr(delimited, "encode", _forbid)
    assert _same(_read(directory), long)
    assert _same(_read(directory, max_history=2), short)


@pytest.mark.parametrize("change", ["content", "time"])
def test_a_stale_cache_is_built_anew_and_said(directory: Path, change: str) -> None:
    _read(directory)
    file = directory / "test.csv"
    if change == "content":
        write_table(file, layout_rows(LAYOUT, 2, 11))
    else:
        os.utime(file, ns=(1, 1))
    with pytest.warns(UserWarning, match="is stale: its files have changed since; it is rebuilt"):
        rebuilt = _read(directory)
    assert len(rebuilt.test) == (11 if change == "content" else 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _same(_read(directory), rebuilt)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("about.json", b"{", "about.json cannot be read"),
        ("about.json", b"{}", "about.json cannot be read"),
        ("about.json", b'{"state": "", "schema": {}, "sizes": [1, 2]}', "about.json cannot be read"),
        ("about.json", None, "about.json cannot be read"),
        ("events.npy", b"\x93NUMPY", "events.npy cannot be read"),
        ("label.npy", b"", "label.npy cannot be read"),
        ("first.npy", None, "first.npy cannot be read"),
        ("last.npy", "half", "last.npy cannot be read"),
        ("user.npy", "dense.npy", "user.npy cannot be read"),
    ],
)
def test_a_broken_cache_is_built_anew_and_said(
    directory: Path, file: str, content: bytes | str | None, reason: str
) -> None:
    before = _read(directory)
    (place,) = (directory / "cache").glob("*/*-*")
    damaged = (place / "dense.npy" if content == "dense.npy" else place / file).read_bytes()
    damaged = damaged[:-100] if content == "half" else content if isinstance(content, bytes) else damaged
    (place / file).unlink()  # It must not be overwritten, because `before` has mapped it.
    if content is not None:
        (place / file).write_bytes(damaged)
    with pytest.warns(UserWarning, match=f"is broken: {reason}"):
        assert _same(_read(directory), before)


def test_a_reading_that_fails_leaves_no_cache(directory: Path) -> None:
    with (directory / "test.csv").open("a") as file:
        file.write("1,2,3\n")
    with pytest.raises(MalformedFileError):
        _read(directory)
    assert {path.name for path in (directory / "cache").glob("*/*")} == {"lock"}


# ---------------------------------------------------------------- schemas

PLAIN = """
name: x
files: {train: a.csv}
split: {by: users, valid: 0.1, test: 0.1}
label: y
user: u
dense: [p, {column: q, transform: log1p, empty: 0}]
categorical: [i, {column: j, table: i}]
candidate: [i]
sequences: {fields: [{column: h, table: i}], max_length: 7}
min_count: 2
min_counts: {i: 3}
"""


def test_a_schema_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(PLAIN)
    schema = load_schema(file)
    assert schema.dense == (Dense("p"), Dense("q", "log1p", 0.0))
    assert schema.categorical == (Ids("i", "i"), Ids("j", "i"))
    assert schema.sequences == Sequences((Ids("h", "i"),), max_length=7)
    assert schema.split == Split("users", 0.1, 0.1)
    assert schema.tables == {"i": 3}
    assert schema.columns() == ["y", "u", "p", "q", "i", "j", "h"]
    assert load_schema(schema) is schema
    assert load_schema(str(file)) == schema


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("label: y", "labels: y", r"x\.yaml: wanted keys among name, .* found 'labels'"),
        ("label: y", "", r"x\.yaml: wanted the key 'label'; found only name, files"),
        ("label: y", "label: 3", r"x\.yaml\.label: wanted a string; found 3"),
        ("label: y", "label: [", "x.yaml: wanted YAML; found"),
        ("min_count: 2", "min_count: yes", r"\.min_count: wanted a whole number; found True"),
        ("min_count: 2", "min_count: 0", "wanted min_count to be at least 1; found 0"),
        ("{i: 3}", "{i: 0}", r"wanted min_counts\['i'\] to be at least 1"),
        ("{i: 3}", "{k: 3}", "wanted min_counts to name tables among i; found 'k'"),
        ("max_length: 7", "max_length: 0", "wanted sequences.max_length to be at least 1"),
        ("max_length: 7", "order: up", "wanted sequences.order to be one of oldest_first, newest_first; found 'up'"),
        ("max_length: 7", "unequal: cut", "wanted sequences.unequal to be one of error, pad; found 'cut'"),
        ("max_length: 7", "separator: ab", "wanted sequences.separator to be one character; found 'ab'"),
        ("max_length: 7", "separator: ''", "wanted sequences.separator to be one character; found ''"),
        ("{column: h, table: i}", "", "wanted sequences.fields to name at least one column"),
        ("column: h, ", "", r"\.sequences\.fields\[0\]: wanted the key 'column'; found only table"),
        ("[{column: h, table: i}]", "h", r"\.sequences\.fields: wanted a list; found 'h'"),
        ("transform: log1p", "transform: log", "wanted dense 'q': transform to be one of none, log1p; found 'log'"),
        ("empty: 0", "empty: no", r"\.dense\[1\]\.empty: wanted a number; found False"),
        ("candidate: [i]", "candidate: [h]", "wanted candidate to name columns among i, j; found 'h'"),
        ("[i, {column: j, table: i}]", "[i, i]", "wanted categorical to name each column once; found 'i'"),
        ("[i, {column: j, table: i}]", "[]", "wanted categorical to name at least one column"),
        ("{train: a.csv}", "{valid: a.csv}", "wanted files to name one for train; found 'valid'"),
        ("{train: a.csv}", "{train: a, dev: b}", "wanted files to be of train, valid, test; found 'dev'"),
        ("{train: a.csv}", "{train: a, test: b}", r"wanted split\.test to be 0, since it has a file; found 0.1"),
        ("test: 0.1}", "test: 0}", r"wanted split\.test to be above 0, since it has no file; found 0.0"),
        ("test: 0.1}", "test: 0.9}", r"wanted split\.valid \+ split\.test to be below 1; found 1.0"),
        ("by: users", "by: chance", r"wanted split\.by to be one of rows, users, time; found 'chance'"),
        ("by: users", "by: time", "wanted time to name a column to split by; found None"),
        (
            "split: {by: users, valid: 0.1, test: 0.1}",
            "",
            "wanted a split for each part without a file; found 'valid, t",
        ),
    ],
)
def test_a_schema_that_does_not_hold_together_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in PLAIN
    file = tmp_path / "x.yaml"
    file.write_text(PLAIN.replace(old, new))
    with pytest.raises(SchemaError, match=message):
        load_schema(file)


def test_a_schema_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="schema: wanted a mapping; found None"):
        parse_schema(None)
    expected = "wanted a YAML file or one of amazon_electronics_x1, kuai_video_x1, taobao_ad_x1; found neither"
    with pytest.raises(FileNotFoundError, match=f"nothing: {expected}"):
        load_schema("nothing")
