"""`read_csv` on files written by the tests, in the shipped layouts and others."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import pytest
import torch
from delimited_tables import LAYOUTS, Row, check, layout_rows, write_table
from hypothesis import given
from hypothesis import strategies as st
from interformer.data import CsvSchema, MalformedFileError, load_schema, read_csv, shipped_schemas
from interformer.data.delimited import compact, rows, spec
from rich.console import Console
from rich.progress import Progress

Ids, Dense, Sequences, Split = spec.Ids, spec.Dense, spec.Sequences, spec.Split
THREE_FILES = {part: f"{part}.csv" for part in spec.PARTS}


def _schema(**changes: object) -> CsvSchema:
    """Columns y, u, i, h, g: label, user, item, and the histories of items and marks; three files."""
    plain = CsvSchema(
        name="tiny",
        files=THREE_FILES,
        label="y",
        user="u",
        categorical=(Ids("i", "item"),),
        sequences=Sequences((Ids("h", "item"), Ids("g", "mark"))),
        candidate=("i",),
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def _row(y: str = "1", u: str = "ann", i: str = "a", h: str = "", g: str = "") -> Row:
    return {"y": y, "u": u, "i": i, "h": h, "g": g}


def _write_parts(directory: Path, **parts: list[Row]) -> Path:
    for part in spec.PARTS:
        write_table(directory / f"{part}.csv", parts.get(part, [_row()]))
    return directory


# ---------------------------------------------------------------- the shipped layouts


@pytest.mark.parametrize("name", LAYOUTS)
def test_shipped_layouts(tmp_path: Path, name: str) -> None:
    """The schema uses exactly the two files of the benchmark, and draws the validation part as described."""
    train, test = layout_rows(name, 0, 90), layout_rows(name, 1, 20)
    write_table(tmp_path / "train.csv", train)
    write_table(tmp_path / "test.csv", test)
    schema = dataclasses.replace(load_schema(name), min_count=3)
    splits = read_csv(tmp_path, schema)
    assert splits.name == name
    assert len(splits.train) + len(splits.valid) == 90
    assert len(splits.test) == 20
    bench = dataclasses.replace(
        schema, files={"train": "train.csv", "valid": "test.csv", "test": "test.csv"}, split=None
    )
    check(read_csv(tmp_path, bench), {"train": train, "valid": test, "test": test}, bench, schema.sequences.max_length)


def test_the_shipped_schemas_are_those_of_the_layouts() -> None:
    assert shipped_schemas() == sorted(LAYOUTS)
    for name, columns in LAYOUTS.items():
        assert set(load_schema(name).columns()) <= set(columns.split())


# ---------------------------------------------------------------- options of a schema

TEXT = st.text(st.sampled_from(["a", "b", "c", "é", ",", '"', "\n", " ", "本"]), max_size=2)
EVENT = st.text(st.sampled_from(["a", "b", "é", ",", '"', "\n"]), min_size=1, max_size=2)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, list[Row]]:
    user = st.sampled_from(["ann", "bob,", 'c"d', "é"])
    parts: dict[str, list[Row]] = {}
    for part in spec.PARTS:
        parts[part] = []
        for _ in range(draw(st.integers(1, 6))):
            events = draw(st.lists(st.tuples(EVENT, EVENT), max_size=5))
            h, g = ("^".join(column) for column in zip(*events, strict=True)) if events else ("", "")
            parts[part].append(_row(draw(st.sampled_from(["0", "1", "1.0"])), draw(user), draw(TEXT), h, g))
    return parts


@given(tables(), st.integers(1, 3), st.integers(1, 5), st.sampled_from(["oldest_first", "newest_first"]))
def test_any_table_comes_back(
    tmp_path_factory: pytest.TempPathFactory, parts: dict[str, list[Row]], min_count: int, longest: int, order: str
) -> None:
    directory = _write_parts(tmp_path_factory.mktemp("table"), **parts)
    schema = _schema(min_count=min_count, min_counts={"mark": 1})
    schema = dataclasses.replace(schema, sequences=dataclasses.replace(schema.sequences, order=order))
    check(read_csv(directory, schema, max_history=longest), parts, schema, longest)


def test_chunks_and_steps_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "taobao_ad_x1"
    write_table(tmp_path / "train.csv", layout_rows(name, 0, 50))
    write_table(tmp_path / "test.csv", layout_rows(name, 1, 11))
    whole = read_csv(tmp_path, name)
    monkeypatch.setattr(rows, "CHUNK", 3)
    monkeypatch.setattr(compact, "STEP", 4)
    pieces = read_csv(tmp_path, name)
    for part in spec.PARTS:
        of_whole, of_pieces = getattr(whole, part), getattr(pieces, part)
        for array in ("dense", "label", "first", "last"):
            assert torch.equal(getattr(of_whole, array), getattr(of_pieces, array))
    # Texts are numbered chunk by chunk, so ids differ, but not their meaning.
    assert whole.schema == pieces.schema
    before, after = whole.train.events.T, pieces.train.events.T
    for whole_ids, piece_ids in zip(
        (*before, *whole.train.categorical.T), (*after, *pieces.train.categorical.T), strict=True
    ):
        pairs = set(zip(whole_ids.tolist(), piece_ids.tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_a_file_without_header_with_other_separators(tmp_path: Path) -> None:
    """Newest event first, empty numbers, a byte order mark, empty lines, Windows line ends."""
    text = "\ufeff1;ann;a;m|n|o;2.5\r\n\r\n0;bob;b;;\r\n"
    for file in ("a.txt", "b.txt"):
        (tmp_path / file).write_bytes(text.encode())
    schema = CsvSchema(
        name="other",
        files={"train": "a.txt", "valid": "b.txt", "test": "b.txt"},
        header=("y", "u", "i", "h", "x"),
        separator=";",
        label="y",
        user="u",
        dense=(Dense("x", empty=-1.0),),
        categorical=(Ids("i", "i"),),
        sequences=Sequences((Ids("h", "h"),), separator="|", max_length=2, order="newest_first"),
    )
    splits = read_csv(tmp_path, schema)
    assert splits.train.dense.tolist() == [[2.5], [-1.0]]
    first, second = (splits.train.batch(torch.tensor([row])) for row in range(2))
    id_of = {text: number for number, text in enumerate(("", "m", "n"))}
    assert sorted(first.sequences[:, 0].tolist()) == [id_of["m"], id_of["n"]]
    assert first.sequences[-1, 0] != first.sequences[0, 0]
    alone = read_csv(tmp_path, schema, max_history=1).train.batch(torch.tensor([0]))
    assert alone.sequences.tolist() == [[1]]  # m, the newest event, is the only text left
    assert len(second.sequences) == 0


def test_numbers_may_be_taken_by_their_logarithm(tmp_path: Path) -> None:
    cells = ["0", "9", "-9", "1e3"]
    lines = "".join(f"1,ann,a,,,{cell}\n" for cell in cells)
    for part in spec.PARTS:
        (tmp_path / f"{part}.csv").write_text("y,u,i,h,g,x\n" + lines)
    splits = read_csv(tmp_path, _schema(dense=(Dense("x", "log1p"),)))
    assert splits.schema.dense == ("x",)
    expected = [0, math.log(10), -math.log(10), math.log(1001)]
    assert splits.test.dense[:, 0].tolist() == pytest.approx(expected)


def test_unequal_histories_are_aligned_at_their_latest_events(tmp_path: Path) -> None:
    parts = {part: [_row(h="a^b^c", g="p^q"), _row(h="", g="p"), _row(h="a", g="")] for part in spec.PARTS}
    schema = _schema(sequences=Sequences((Ids("h", "item"), Ids("g", "mark")), unequal="pad"))
    splits = read_csv(_write_parts(tmp_path, **parts), schema)
    check(splits, parts, schema, 100)
    batch = splits.train.batch(torch.tensor([0]))
    assert (batch.sequences == 0).tolist() == [[False, True], [False, False], [False, False]]


def test_rare_and_unseen_texts_are_unknown(tmp_path: Path) -> None:
    """Counts cover the training part: cells and histories together, after truncation."""
    train = [_row(i="a", h="b^c", g="p^p"), _row(i="a", h="b^b", g="p^p"), _row(i="c", h="", g="")]
    held_out = [_row(i="d", h="a^b^c^d", g="p^p^p^p")]
    directory = _write_parts(tmp_path, train=train, test=held_out)
    splits = read_csv(directory, _schema(min_counts={"item": 2}))
    assert splits.schema.tables == {"item": 4, "mark": 2}
    assert splits.test.categorical.tolist() == [[0]]
    assert sorted(splits.test.batch(torch.tensor([0])).sequences[:, 0].tolist()) == [0, 1, 2, 3]
    short = read_csv(directory, _schema(min_counts={"item": 2}), max_history=1)
    assert short.schema.tables == {"item": 3, "mark": 2}  # b occurs once
    rarer = read_csv(directory, _schema(min_counts={"item": 3}), max_history=1)
    assert rarer.schema.tables == {"item": 1, "mark": 2}


# ---------------------------------------------------------------- parts


def _one_file(directory: Path, table: list[tuple[str, str, str]]) -> Path:
    """A training file of (user, item, time)."""
    lines = [f"1,{user},{item},,,{time}" for user, item, time in table]
    (directory / "train.csv").write_text("\n".join(["y,u,i,h,g,t", *lines]) + "\n")
    return directory


def _where(directory: Path, split: Split) -> list[list[int]]:
    """The items of each part; item `n` is the n-th of the file."""
    schema = _schema(files={"train": "train.csv"}, split=split, time="t", categorical=(Ids("i", "item"), Ids("t", "t")))
    parts = read_csv(directory, schema).parts().values()
    result = [part.user.tolist() for part in parts]
    return [[user - 1 for user in users] for users in result]  # Users are numbered from 1 in the file's order.


def test_a_split_by_time_keeps_one_time_together(tmp_path: Path) -> None:
    times = [5, 1, 1, 2, 3, 3, 3, 4, 9, 8]  # in order 1 1 2 3 3 3 4 5 8 9
    directory = _one_file(tmp_path, [(f"u{n}", "i", f"{time}.5") for n, time in enumerate(times)])
    assert _where(directory, Split("time", valid=0.4, test=0.2)) == [[1, 2, 3, 4, 5, 6], [0, 7], [8, 9]]


@pytest.mark.parametrize("by", ["rows", "users"])
def test_seeded_splits_have_about_their_shares(tmp_path: Path, by: str) -> None:
    directory = _one_file(tmp_path, [(f"u{n if by == 'rows' else n // 2}", "i", "1") for n in range(2000)])
    first, repeated, of_other_seed = (
        _where(directory, Split(by, valid=0.3, test=0.1, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == repeated
    assert first != of_other_seed
    users = 2000 if by == "rows" else 1000
    for part, share in zip(first, (0.6, 0.3, 0.1), strict=True):
        assert abs(len(set(part)) - share * users) < 5 * math.sqrt(share * (1 - share) * users)
    assert not set(first[0]) & set(first[1]) | set(first[1]) & set(first[2]) | set(first[0]) & set(first[2])


def test_a_part_without_rows_is_said(tmp_path: Path) -> None:
    directory = _one_file(tmp_path, [("u", "i", "1")])
    with pytest.raises(ValueError, match="wanted rows in each part of 'tiny'; (train|valid|test) has none"):
        _where(directory, Split("rows", valid=0.3, test=0.3))


# ---------------------------------------------------------------- malformed files


@pytest.mark.parametrize(
    ("line", "text", "place", "message"),
    [
        (1, b"y,u,i,h,x", "1:5", "wanted a column 'g', found only y, u, i, h, x"),
        (1, b"y,u,i,h,g,u,x", "1:6", "column 'u' is twice in the header"),
        (3, b"1,ann,a,p,q", "3:5", "wanted 6 cells, as in the header, found 5"),
        (3, b"1,ann,a,p,q,1,2", "3:7", "wanted 6 cells, as in the header, found 7"),
        (3, b"1,ann,a,p,q,one", "3:6", "column 'x' wanted a finite number, found 'one'"),
        (3, b"1,ann,a,p,q,", "3:6", "column 'x' wanted a finite number, found ''"),
        (3, b"1,ann,a,p,q,nan", "3:6", "column 'x' wanted a finite number, found 'nan'"),
        (4, b"2,ann,a,p,q,1", "4:1", "column 'y' wanted a label 0 or 1, found '2'"),
        (4, b"yes,ann,a,p,q,1", "4:1", "column 'y' wanted a finite number, found 'yes'"),
        (4, b"1,,a,p,q,1", "4:2", "column 'u' wanted a user, found an empty cell"),
        (4, b"1,ann,a,p^q,q,1", "4:5", "column 'g' wanted 2 events, as in column 'h', found 1"),
        (4, b"1,ann,a,p,,1", "4:5", "column 'g' wanted 1 events, as in column 'h', found 0"),
        (4, b"1,ann,a\xff,p,q,1", "4:3", "wanted UTF-8 text, found the bytes b'\\xff'"),
        (4, b"\xff,ann,a,p,q,1", "4:1", "wanted UTF-8 text, found the bytes b'\\xff'"),
        (4, b'1,"ann"x,a,p,q,1', "4:1", "wanted cells as in RFC 4180, found: "),
        (5, b'1,ann,"a,p,q,1', "5:1", "wanted cells as in RFC 4180, found: unexpected end of data"),
    ],
)
def test_malformed_files_are_named_with_line_and_column(
    tmp_path: Path, line: int, text: bytes, place: str, message: str
) -> None:
    lines = [b"y,u,i,h,g,x", *[b"0,bob,b,p^q,p^q,1"] * 4]
    for part in spec.PARTS:
        (tmp_path / f"{part}.csv").write_bytes(b"\n".join(lines) + b"\n")
    lines[line - 1] = text
    file = tmp_path / "valid.csv"
    file.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(MalformedFileError) as caught:
        read_csv(tmp_path, _schema(dense=(Dense("x"),)))
    assert str(caught.value).startswith(f"{file}:{place}: ")
    assert message in str(caught.value)


def test_lines_are_counted_across_empty_ones_and_quoted_line_ends(tmp_path: Path) -> None:
    _write_parts(tmp_path)
    (tmp_path / "test.csv").write_text('y,u,i,h,g\n\n1,ann,"a\nb",,\n\n1,ann,a,b,\n')
    with pytest.raises(MalformedFileError, match=r"test\.csv:6:5: column 'g' wanted 1 events"):
        read_csv(tmp_path, _schema())


def test_empty_and_missing_files_are_named(tmp_path: Path) -> None:
    _write_parts(tmp_path)
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(MalformedFileError, match=r"train\.csv:1:1: wanted a column 'y', found an empty file"):
        read_csv(tmp_path, _schema())
    (tmp_path / "test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.csv: no such file; the schema 'tiny' wants it"):
        read_csv(tmp_path, _schema())
    with pytest.raises(ValueError, match="read_csv: wanted max_history >= 1, found 0"):
        read_csv(tmp_path, _schema(), max_history=0)


# ---------------------------------------------------------------- progress


def test_progress_counts_the_bytes_of_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = _write_parts(tmp_path, train=[_row()] * 10)
    bars = Progress(console=Console(file=io.StringIO()))
    read_csv(directory, _schema(), progress=bars)
    (task,) = bars.tasks
    assert task.completed == task.total == sum(file.stat().st_size for file in directory.glob("*.csv"))
    read_csv(directory, _schema())
    assert capsys.readouterr() == ("", "")
