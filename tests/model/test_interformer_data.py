"""Readers and clicks, on files written by the tests, and on the real MovieLens-100k if it is available."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from interformer.data import MalformedFileError, Splits, read_movielens
from interformer.data.atomic import read_atomic
from interformer.data.movielens import _year_bucket
from real_data import real_data

Rating = tuple[str, str, int, int]  # user, item, rating, timestamp


def _write(directory: Path, ratings: list[Rating], users: int = 6, items: int = 9) -> Path:
    genres = ["Drama", "Comedy War", "Drama War Western Crime", ""]
    films = [f"i{i}\tFilm {i}\t{1950 + 7 * i if i else 'V'}\t{genres[i % 4]}" for i in range(items)]
    people = [f"u{u}\t{15 + 9 * u}\t{'MF'[u % 2]}\tjob{u % 3}\t0000{u}" for u in range(users)]
    lines = ["\t".join(map(str, rating)) for rating in ratings]
    tables = {
        "inter": ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *lines],
        "item": ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq", *films],
        "user": ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token", *people],
    }
    for suffix, content in tables.items():
        (directory / f"tiny.{suffix}").write_text("\n".join(content) + "\n")
    return directory


def _random_ratings(seed: int, users: int = 6, items: int = 9) -> list[Rating]:
    """Every user rates most items, several in the same second; after a split in fifths, no part is empty."""
    rng = random.Random(seed)
    pairs = [(u, i) for u in range(users) for i in range(items) if rng.random() < 0.9]
    rng.shuffle(pairs)
    return [(f"u{u}", f"i{i}", rng.randint(1, 5), 1000 + rng.randint(0, 6)) for u, i in pairs]


def _parts(splits: Splits) -> list[tuple[int, int, int]]:
    """(user, item, part) of every impression."""
    columns = [field.name for field in splits.schema.categorical]
    item = columns.index("item")
    rows = []
    for part_number, part in enumerate(splits.parts().values()):
        rows += [
            (u, i, part_number) for u, i in zip(part.user.tolist(), part.categorical[:, item].tolist(), strict=True)
        ]
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_a_history_is_what_the_user_rated_strictly_before(tmp_path: Path, seed: int) -> None:
    ratings = _random_ratings(seed)
    splits = read_movielens(_write(tmp_path, ratings), valid=0.2, test=0.2)
    rating_and_time = {(u, i): (rating, time) for u, i, rating, time in ratings}
    events = [field.name for field in splits.schema.sequences]
    checked = 0
    for part in splits.parts().values():
        for row in range(len(part)):
            batch = part.batch(torch.tensor([row]))
            user, item = f"u{batch.user.item()}", f"i{batch.categorical[0, 4].item()}"
            rating, now = rating_and_time[user, item]
            assert batch.label.item() == (rating >= 4)
            items = [f"i{i}" for i in batch.sequences[:, events.index("item")].tolist()]
            earlier = {i for (u, i), (_, time) in rating_and_time.items() if u == user and time < now}
            assert set(items) == earlier
            assert len(items) == len(earlier)
            levels = (batch.sequences[:, events.index("rating")] + 1).tolist()
            assert levels == [rating_and_time[user, i][0] for i in items]
            times = [rating_and_time[user, i][1] for i in items]
            assert times == sorted(times)
            checked += 1
    assert checked == len(ratings)


@pytest.mark.parametrize("seed", range(4))
def test_the_split_is_by_time_within_the_user_and_keeps_a_second_together(tmp_path: Path, seed: int) -> None:
    ratings = _random_ratings(seed)
    parts = _parts(read_movielens(_write(tmp_path, ratings), valid=0.2, test=0.2))
    times = {(int(u[1:]), int(i[1:])): time for u, i, _, time in ratings}
    assert {part_number for _, _, part_number in parts} == {0, 1, 2}
    assert sorted((u, i) for u, i, _ in parts) == sorted(times)
    part_of_second: dict[tuple[int, int], int] = {}
    for u, i, part_number in parts:
        assert part_of_second.setdefault((u, times[u, i]), part_number) == part_number
    for u, time in part_of_second:
        later = [part for (user, t), part in part_of_second.items() if user == u and t > time]
        assert all(part >= part_of_second[u, time] for part in later)


@pytest.mark.parametrize("seed", range(3))
def test_an_impression_is_blind_to_its_own_and_to_later_labels(tmp_path: Path, seed: int) -> None:
    """Reversing all ratings from the impression's second on changes none of its inputs."""
    ratings = _random_ratings(seed)
    now = 1003
    changed = [(u, i, 6 - rating if time >= now else rating, time) for u, i, rating, time in ratings]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    before, after = (
        read_movielens(_write(tmp_path / name, table), valid=0.2, test=0.2)
        for name, table in (("a", ratings), ("b", changed))
    )
    times = {(int(u[1:]), int(i[1:])): time for u, i, _, time in ratings}
    flipped = 0
    prior = before.schema.dense.index("item_liked")
    for name, part in before.parts().items():
        changed_part = after.parts()[name]
        for row in range(len(part)):
            batch, changed_batch = part.batch(torch.tensor([row])), changed_part.batch(torch.tensor([row]))
            assert torch.equal(batch.categorical, changed_batch.categorical)
            if times[batch.user.item(), batch.categorical[0, 4].item()] > now:
                continue
            assert torch.equal(batch.sequences, changed_batch.sequences)
            # The prior of item_liked is one number for all impressions, computed from the whole training part.
            keep = [i for i in range(batch.dense.shape[1]) if i != prior]
            assert torch.equal(batch.dense[:, keep], changed_batch.dense[:, keep])
            flipped += bool(batch.label.item() != changed_batch.label.item())
    assert flipped, "the case must turn over labels of impressions that were compared"


def test_popularity_counts_earlier_training_ratings_alone(tmp_path: Path) -> None:
    ratings = _random_ratings(2)
    splits = read_movielens(_write(tmp_path, ratings), valid=0.2, test=0.2)
    part_of = {(u, i): part_number for u, i, part_number in _parts(splits)}
    table = [(int(u[1:]), int(i[1:]), rating, time) for u, i, rating, time in ratings]
    train = [row for row in table if part_of[row[0], row[1]] == 0]
    prior = sum(rating >= 4 for *_, rating, _ in train) / len(train)
    time_of = {(u, i): time for u, i, _, time in table}
    for part in splits.parts().values():
        for u, i, dense in zip(part.user.tolist(), part.categorical[:, 4].tolist(), part.dense, strict=True):
            liked = [rating >= 4 for _, rated, rating, time in train if rated == i and time < time_of[u, i]]
            expected = (sum(liked) + 10 * prior) / (len(liked) + 10) - prior
            assert dense[1].item() == pytest.approx(math.log1p(len(liked)) / 5, abs=1e-6)
            assert dense[2].item() == pytest.approx(expected, abs=1e-6)


def test_features_of_people_and_films(tmp_path: Path) -> None:
    later_ratings = [("u0", "i3", 5, 100), ("u0", "i4", 5, 200)]  # so that the other parts are not empty
    ratings = [(f"u{u}", "i2", 5, 10 * u) for u in range(6)] + later_ratings
    splits = read_movielens(_write(tmp_path, ratings), valid=0.4, test=0.4)
    part = splits.train
    columns = {field.name: i for i, field in enumerate(splits.schema.categorical)}
    assert part.categorical[:, columns["age"]].tolist() == [0, 1, 2, 3, 5, 6]  # 15, 24, 33, 42, 51, 60
    assert part.categorical[:, columns["gender"]].tolist() == [1, 0, 1, 0, 1, 0]
    genres = part.categorical[0, columns["genre_1"] : columns["genre_3"] + 1].tolist()
    assert len(set(genres)) == 3
    assert 0 not in genres
    assert [_year_bucket(text) for text in ("V", "1912", "1931", "1989", "1990", "1997", "2050")] == [
        0,
        1,
        2,
        7,
        8,
        15,
        47,
    ]
    assert part.lengths.tolist() == [0] * 6


def test_histories_keep_their_latest_events(tmp_path: Path) -> None:
    directory = _write(tmp_path, [("u0", f"i{i}", 3, i) for i in range(9)])
    whole, short = (
        read_movielens(directory, max_history=max_history, valid=0.2, test=0.12).test for max_history in (200, 3)
    )
    assert whole.lengths.tolist() == [8]
    assert short.batch(torch.tensor([0])).sequences.equal(whole.batch(torch.tensor([0])).sequences[-3:])


# ---------------------------------------------------------------- malformed files


def _replace_line(path: Path, number: int, text: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = text
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(
    ("file", "line", "text", "place", "message"),
    [
        ("inter", 3, b"u0\ti1\tfive\t3", "3:3", "column 'rating' wanted a float, found 'five'"),
        ("inter", 3, b"u0\ti1\tnan\t3", "3:3", "column 'rating' wanted a float, found 'nan'"),
        ("inter", 4, b"u0\ti1\t6\t3", "4:3", "column 'rating' wanted 1 to 5, found 6"),
        ("inter", 2, b"u0\ti1\t4\t", "2:4", "column 'timestamp' wanted a float, found ''"),
        ("inter", 2, b"u0\ti1\t4", "2:3", "wanted 4 tab-separated cells, as in the header, found 3"),
        ("inter", 2, b"u0\ti1\t4\t3\t9", "2:5", "found 5"),
        ("inter", 2, b"u77\ti1\t4\t3", "2:1", "column 'user_id' names 'u77', which"),
        ("inter", 2, b"u0\ti77\t4\t3", "2:2", "column 'item_id' names 'i77', which"),
        ("inter", 1, b"user_id:token\titem_id:token\trating:float", "1:3", "wanted a column 'timestamp', found only"),
        ("inter", 1, b"user_id\titem_id:token\trating:float\ttimestamp:float", "1:1", "wanted a header cell name:type"),
        ("inter", 1, b"user_id:token\titem_id:token\trating:token\ttimestamp:float", "1:3", "must be of type float"),
        ("inter", 1, b"user_id:token\tuser_id:token\trating:float\ttimestamp:float", "1:2", "is twice"),
        ("user", 3, b"u1\told\tF\tjob\t0", "3:2", "column 'age' wanted an age in years, found 'old'"),
        ("user", 3, b"u0\t30\tF\tjob\t0", "3:1", "column 'user_id' names 'u0' a second time"),
        ("item", 2, b"i0\tFilm \xff\t1990\tDrama", "2:2", "wanted UTF-8 text, found the bytes"),
    ],
)
def test_malformed_files_are_named_with_line_and_column(
    tmp_path: Path, file: str, line: int, text: bytes, place: str, message: str
) -> None:
    _write(tmp_path, [("u0", f"i{i}", 3, i) for i in range(9)])
    _replace_line(tmp_path / f"tiny.{file}", line, text)
    with pytest.raises(MalformedFileError) as caught:
        read_movielens(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / f'tiny.{file}'}:{place}: ")
    assert message in str(caught.value)


def test_line_numbers_count_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.inter"
    path.write_bytes(b"a:float\tb:token_seq\r\n1\tx y\r\n\r\nz\t\r\n")
    with pytest.raises(MalformedFileError, match=r"x\.inter:4:1: column 'a' wanted a float, found 'z'"):
        read_atomic(path, {"a": "float", "b": "token_seq"})


def test_an_atomic_table_is_read_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.item"
    path.write_text("b:token_seq\tc:token\ta:float_seq\nx y\tno\t1 2.5\n\tno\t\n")
    table = read_atomic(path, {"a": "float_seq", "b": "token_seq"})
    assert (table["a"], table["b"]) == ([[1.0, 2.5], []], [["x", "y"], []])


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="wanted a directory"):
        read_movielens(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"exactly one file NAME\.inter, found none"):
        read_movielens(tmp_path)
    _write(tmp_path, [("u0", "i0", 3, 0)])
    (tmp_path / "tiny.user").unlink()
    with pytest.raises(FileNotFoundError, match=r"tiny\.user: no such file"):
        read_movielens(tmp_path)


@pytest.mark.parametrize("options", [{"max_history": 0}, {"valid": 0.0}, {"valid": 0.5, "test": 0.5}])
def test_bad_reader_options_are_named(tmp_path: Path, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wanted max_history >= 1, valid > 0"):
        read_movielens(tmp_path, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------- clicks and batches


@pytest.fixture
def tiny(tmp_path: Path) -> Splits:
    return read_movielens(_write(tmp_path, _random_ratings(0)), valid=0.2, test=0.2)


def test_batches_hold_every_impression_once_and_depend_on_the_seed_alone(tiny: Splits) -> None:
    clicks = tiny.train
    for seed in (None, 3):
        rows = torch.cat(clicks.batch_rows(4, seed=seed))
        assert rows.sort().values.equal(torch.arange(len(clicks)))
    torch.manual_seed(1)
    first = torch.cat(clicks.batch_rows(4, seed=3))
    torch.manual_seed(2)
    assert first.equal(torch.cat(clicks.batch_rows(4, seed=3)))
    assert not first.equal(torch.cat(clicks.batch_rows(4, seed=4)))


def test_batches_put_similar_lengths_together(tiny: Splits) -> None:
    clicks = tiny.train
    spread = [(clicks.lengths[rows].max() - clicks.lengths[rows].min()).item() for rows in clicks.batch_rows(8, seed=0)]
    assert max(spread) < clicks.lengths.max()
    lengths = [clicks.lengths[rows] for rows in clicks.batch_rows(8)]
    assert torch.cat(lengths).equal(clicks.lengths.sort().values)


@pytest.mark.parametrize("change", [lambda c: c.without_history(), lambda c: c.with_shuffled_history(1)])
def test_changed_histories_leave_the_rest(tiny: Splits, change: Callable[..., object]) -> None:
    clicks = tiny.train
    changed = change(clicks)
    rows = torch.arange(len(clicks))
    original, altered = clicks.batch(rows), changed.batch(rows)  # type: ignore[attr-defined]
    assert altered.categorical.equal(original.categorical)
    assert altered.label.equal(original.label)
    if len(altered.sequences):
        assert altered.offsets.equal(original.offsets)
        assert not altered.sequences.equal(original.sequences)
        for b in range(len(rows)):
            span = slice(int(original.offsets[b]), int(original.offsets[b + 1]))
            assert sorted(altered.sequences[span].tolist()) == sorted(original.sequences[span].tolist())
    else:
        assert not altered.offsets.any()


def test_a_batch_moves_as_a_whole(tiny: Splits) -> None:
    batch = tiny.train.batch(torch.arange(3)).to("meta")
    assert all(x.is_meta for x in batch.tensors().values())
    assert len(batch) == 3


# ---------------------------------------------------------------- the real data


def test_movielens_100k() -> None:
    splits = read_movielens(real_data("ml-100k", "*.inter"))
    sizes = {name: len(part) for name, part in splits.parts().items()}
    assert sum(sizes.values()) == 100_000
    assert sizes == {"train": 81494, "valid": 9857, "test": 8649}
    labels = torch.cat([part.label for part in splits.parts().values()])
    assert labels.mean().item() == pytest.approx(0.55375)
    assert splits.schema.tables["user"] == 943
    assert splits.schema.tables["item"] == 1682
