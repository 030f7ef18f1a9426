"""MovieLens as a click task: will this user rate this film 4 or higher, given the user's earlier ratings?

The directory holds one data set in RecBole's atomic form, as RecBole's own scripts write `ml-100k`: `NAME.inter`
(user_id, item_id, rating, timestamp), `NAME.item` (item_id, release_year, class) and `NAME.user` (user_id, age, gender,
occupation). Nothing is downloaded.

Split: per user by time, the first 80 % of the ratings train, the next 10 % validate, the last 10 % test; ratings of one
user with one timestamp stay together, in the part where the first of them falls.
No leakage: the history of an impression is the user's ratings with a *strictly* earlier timestamp, so neither the
impression's own rating nor one given in the same second is in it. Vocabularies come from the item and user tables;
popularity counts (dense features) come from training ratings of strictly earlier timestamps alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from interformer import checks
from interformer.checks import shown
from interformer.data.atomic import Table, read_atomic
from interformer.data.clicks import Clicks, Splits, want_rows
from interformer.schema import Field, Schema

LIKED = 4.0
PARTS = ("train", "valid", "test")
LATEST = 2.0**53  # of seconds: up to there each one is a number of its own
GENRES = 3  # genre fields of a film: its first three, id 0 where it has fewer
Ints = NDArray[np.int64]


class Films(NamedTuple):
    """What is known of every film; `rows` says which row of the arrays is whose."""

    rows: dict[str, int]
    year: Ints  # [items] bucket
    genres: Ints  # [items, GENRES]
    num_genres: int  # ids of the genre table, 0 (none) included


class People(NamedTuple):
    """What is known of every user: `fields [users, 3]` are age bucket, gender, occupation, of `sizes` ids each."""

    rows: dict[str, int]
    fields: Ints
    sizes: tuple[int, int, int]


class Ratings(NamedTuple):
    """All ratings `[N]`, sorted by user, then time, then film."""

    user: Ints
    item: Ints
    rating: NDArray[np.float64]
    time: NDArray[np.float64]


def read_movielens(directory: Path | str, *, max_history: int = 200, valid: float = 0.1, test: float = 0.1) -> Splits:
    """The three parts of the data set in `directory`; histories keep their last `max_history` ratings.

    Raises:
        FileNotFoundError: `directory` is none, or does not hold exactly one `*.inter` with its `.item` and `.user`.
        MalformedFileError: naming file, line and column of what cannot be read: also an unknown or doubled id, or a
            rating outside 1 to 5.
        ValueError: a bad argument, or a part without rows.
    """
    checks.kind("read_movielens: max_history", max_history, int)
    checks.kind("read_movielens: valid", valid, int, float)
    checks.kind("read_movielens: test", test, int, float)
    if not 1 <= max_history <= checks.LARGEST or not (valid > 0 and test > 0 and valid + test < 1):
        wanted = "max_history >= 1, valid > 0, test > 0 and valid + test < 1"
        raise ValueError(f"read_movielens: wanted {wanted}; found {shown(max_history)}, {valid}, {test}")
    stem = _find_stem(Path(directory))
    films, people = _read_films(stem.with_suffix(".item")), _read_people(stem.with_suffix(".user"))
    ratings = _read_ratings(stem.with_suffix(".inter"), films, people)
    part = _split_by_time(ratings, 1 - valid - test, 1 - test)
    sizes = np.bincount(part, minlength=len(PARTS)).tolist()
    want_rows(directory, stem.name, dict(zip(PARTS, sizes, strict=True)))
    clicks = _impressions(films, people, ratings, part == 0).latest(max_history)
    train, valid_part, test_part = (clicks.select(torch.from_numpy(part == which)) for which in range(3))
    return Splits(stem.name, train, valid_part, test_part)


def _find_stem(directory: Path) -> Path:
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: wanted a directory with NAME.inter, NAME.item and NAME.user, found none")
    found = sorted(directory.glob("*.inter"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{directory}: wanted exactly one file NAME.inter, found {names}")
    return found[0].with_suffix("")


# ---------------------------------------------------------------- the three tables


def _index(table: Table, name: str) -> dict[str, int]:
    index: dict[str, int] = {}
    for row, key in enumerate(table[name]):
        if index.setdefault(key, row) != row:
            raise table.bad(row, name, f"names {shown(key)} a second time")
    return index


def _ids(values: Sequence[str]) -> tuple[Ints, int]:
    """Values numbered in sorted order, and how many there are."""
    known = {value: i for i, value in enumerate(sorted(set(values)))}
    return np.array([known[value] for value in values], np.int64), len(known)


def _read_films(path: Path) -> Films:
    table = read_atomic(path, {"item_id": "token", "release_year": "token", "class": "token_seq"})
    # Rare genres first: where a film has more genres than fields, the common ones say least about it.
    count: dict[str, int] = {}
    for genres in table["class"]:
        for genre in genres:
            count[genre] = count.get(genre, 0) + 1
    number = {genre: i + 1 for i, genre in enumerate(sorted(count))}
    ids = np.zeros((len(table), GENRES), np.int64)
    for row, genres in enumerate(table["class"]):
        kept = sorted(set(genres), key=lambda genre: (count[genre], genre))[:GENRES]
        ids[row, : len(kept)] = [number[genre] for genre in kept]
    year = np.empty(len(table), np.int64)
    for row, text in enumerate(table["release_year"]):
        if text.isdecimal() and len(text) > MOST_DIGITS:
            raise table.bad(row, "release_year", f"wanted a year of at most {MOST_DIGITS} digits, found {shown(text)}")
        year[row] = _year_bucket(text)
    return Films(_index(table, "item_id"), year, ids, len(number) + 1)


def _year_bucket(text: str) -> int:
    """0 unknown, then decades from before 1930 to the eighties (1-7), then single years from 1990 (8) to 2029 (47)."""
    if not text.isdecimal():
        return 0
    year = min(int(text), 2029)
    return year - 1990 + 8 if year >= 1990 else max(1, (year - 1930) // 10 + 2)


NUM_YEARS = 48
MOST_DIGITS = 4  # of a year, or of an age
AGES = (18, 25, 35, 45, 50, 56)  # where a new age bucket begins, as MovieLens itself groups them


def _read_people(path: Path) -> People:
    table = read_atomic(path, {"user_id": "token", "age": "token", "gender": "token", "occupation": "token"})
    ages = np.empty(len(table), np.int64)
    for row, text in enumerate(table["age"]):
        if not text.isdecimal() or len(text) > MOST_DIGITS:
            raise table.bad(row, "age", f"wanted an age in years, found {shown(text)}")
        ages[row] = np.searchsorted(AGES, int(text), side="right")
    gender, genders = _ids(table["gender"])
    occupation, occupations = _ids(table["occupation"])
    fields = np.stack((ages, gender, occupation), 1)
    return People(_index(table, "user_id"), fields, (len(AGES) + 1, genders, occupations))


def _read_ratings(path: Path, films: Films, people: People) -> Ratings:
    kinds = {"user_id": "token", "item_id": "token", "rating": "float", "timestamp": "float"}
    table = read_atomic(path, kinds)
    columns = []
    for name, index in (("user_id", people.rows), ("item_id", films.rows)):
        for row, key in enumerate(table[name]):
            if key not in index:
                raise table.bad(row, name, f"names {shown(key)}, which the table of its kind does not list")
        columns.append(np.array([index[key] for key in table[name]], np.int64))
    for row, rating in enumerate(table["rating"]):
        if not 1 <= rating <= 5:
            raise table.bad(row, "rating", f"wanted 1 to 5, found {rating:g}")
    for row, time in enumerate(table["timestamp"]):
        if abs(time) > LATEST:
            raise table.bad(row, "timestamp", f"wanted seconds within {LATEST:.0f}, found {time:g}")
    user, item = columns
    rating, time = np.array(table["rating"]), np.array(table["timestamp"])
    order = np.lexsort((item, time, user))
    return Ratings(user[order], item[order], rating[order], time[order])


# ---------------------------------------------------------------- impressions


def _starts(*keys: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a run of equal keys begins."""
    begin = np.zeros(len(keys[0]), bool)
    begin[:1] = True
    for key in keys:
        begin[1:] |= key[1:] != key[:-1]
    return begin


def _run_first(begin: NDArray[np.bool_]) -> Ints:
    """For each place, where its run begins."""
    return np.maximum.accumulate(np.where(begin, np.arange(len(begin)), 0))


def _split_by_time(ratings: Ratings, train: float, seen: float) -> Ints:
    """0, 1 or 2 (train, valid, test) for each rating, by where its group of equal times begins."""
    first = _run_first(_starts(ratings.user))
    size = np.bincount(ratings.user)[ratings.user]
    share = (_run_first(_starts(ratings.user, ratings.time)) - first) / size
    return (share >= train).astype(np.int64) + (share >= seen)


def _popularity(ratings: Ratings, counted: NDArray[np.bool_]) -> tuple[Ints, NDArray[np.float64]]:
    """How many of the `counted` ratings each film had at a strictly earlier time, and how many of those were liked."""
    order = np.lexsort((ratings.time, ratings.item))
    item, time = ratings.item[order], ratings.time[order]
    weight = counted[order].astype(np.float64)
    liked = weight * (ratings.rating[order] >= LIKED)
    first, group = _run_first(_starts(item)), _run_first(_starts(item, time))
    sums = []
    for value in (weight, liked):
        before = np.r_[0.0, np.cumsum(value)]
        out = np.empty(len(order))
        out[order] = before[group] - before[first]
        sums.append(out)
    return sums[0].astype(np.int64), sums[1]


def _gap_bucket(ratings: Ratings) -> Ints:
    """Time since the user's previous rating: 0 first of the user, 1 same second, then powers of four seconds, to 11."""
    gap = np.diff(ratings.time, prepend=ratings.time[:1])
    bucket = 1 + np.ceil(np.log2(np.maximum(gap, 0) + 1) / 2).astype(np.int64)
    return np.where(_starts(ratings.user), 0, np.minimum(bucket, 11))


def _impressions(films: Films, people: People, ratings: Ratings, counted: NDArray[np.bool_]) -> Clicks:
    user, item = ratings.user, ratings.item
    level = np.rint(ratings.rating).astype(np.int64) - 1
    seen, liked = _popularity(ratings, counted)
    prior = float((ratings.rating[counted] >= LIKED).mean())
    first, last = _run_first(_starts(user)), _run_first(_starts(user, ratings.time))
    dense = np.stack((np.log1p(last - first) / 5, np.log1p(seen) / 5, (liked + 10 * prior) / (seen + 10) - prior), 1)
    genres = films.genres[item]
    person = people.fields[user]
    categorical = np.concatenate((user[:, None], person, item[:, None], films.year[item][:, None], genres), 1)
    events = np.concatenate((item[:, None], level[:, None], genres[:, :2], _gap_bucket(ratings)[:, None]), 1)
    return Clicks(
        schema=_schema(films, people),
        dense=torch.from_numpy(dense.astype(np.float32)),
        categorical=torch.from_numpy(categorical),
        events=torch.from_numpy(events),
        first=torch.from_numpy(first),
        last=torch.from_numpy(last),
        label=torch.from_numpy((ratings.rating >= LIKED).astype(np.float32)),
        user=torch.from_numpy(user),
    )


def _schema(films: Films, people: People) -> Schema:
    ages, genders, occupations = people.sizes
    tables = {
        "user": len(people.rows),
        "age": ages,
        "gender": genders,
        "occupation": occupations,
        "item": len(films.rows),
        "year": NUM_YEARS,
        "genre": films.num_genres,
        "rating": 5,
        "gap": 12,
    }
    genres = tuple(Field(f"genre_{i + 1}", "genre") for i in range(GENRES))
    plain = tuple(Field(name, name) for name in ("user", "age", "gender", "occupation", "item", "year"))
    events = (Field("item", "item"), Field("rating", "rating"), *genres[:2], Field("gap", "gap"))
    candidate = ("item", "year", *(genre.name for genre in genres))
    return Schema(tables, ("history_length", "item_seen", "item_liked"), plain + genres, events, candidate)
