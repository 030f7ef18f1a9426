"""MovieLens as a click task: will this user rate this film 4 or higher, given the user's earlier ratings?

The directory holds one data set in RecBole's atomic form, as written by RecBole's scripts for `ml-100k`: `NAME.inter`
(user_id, item_id, rating, timestamp), `NAME.item` (item_id, release_year, class) and `NAME.user` (user_id, age, gender,
occupation). Nothing is downloaded.

Split: per user by time, the first 80 % of the ratings train, the next 10 % validate, the last 10 % test; ratings of one
user with equal timestamps stay together, in the part of the first of them.
No leakage: the history of an impression is the user's ratings with a *strictly* earlier timestamp, so it contains
neither the impression's own rating nor one given in the same second. Vocabularies come from the item and user tables;
popularity counts (dense features) come only from training ratings with strictly earlier timestamps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from interformer import checks
from interformer.checks import short_repr
from interformer.data.atomic import Table, read_atomic
from interformer.data.clicks import Clicks, Splits, check_not_empty
from interformer.schema import Field, Schema

LIKED = 4.0
PARTS = ("train", "valid", "test")
MAX_TIME = 2.0**53  # seconds; float64 holds every whole number up to it
GENRES = 3  # number of genre fields of a film; id 0 fills the fields of a film with fewer genres
Ints = NDArray[np.int64]


class Films(NamedTuple):
    """The features of every film; `rows` maps its id to its row of the arrays."""

    rows: dict[str, int]
    year: Ints  # [items] bucket
    genres: Ints  # [items, GENRES]
    num_genres: int  # number of ids of the genre table, 0 (none) included


class People(NamedTuple):
    """The features of every user: `fields [users, 3]` are age bucket, gender, occupation, with `sizes` ids each."""

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
        FileNotFoundError: `directory` does not exist, or does not hold exactly one `*.inter` with `.item` and `.user`.
        MalformedFileError: an invalid cell, an unknown or duplicate id, or a rating outside 1 to 5; with file, line and
            column.
        ValueError: a wrong argument, or a part without rows.
    """
    checks.kind("read_movielens: max_history", max_history, int)
    checks.kind("read_movielens: valid", valid, int, float)
    checks.kind("read_movielens: test", test, int, float)
    if not 1 <= max_history <= checks.LARGEST or not (valid > 0 and test > 0 and valid + test < 1):
        expected = "max_history >= 1, valid > 0, test > 0 and valid + test < 1"
        raise ValueError(f"read_movielens: wanted {expected}; found {short_repr(max_history)}, {valid}, {test}")
    stem = _find_stem(Path(directory))
    films, people = _read_films(stem.with_suffix(".item")), _read_people(stem.with_suffix(".user"))
    ratings = _read_ratings(stem.with_suffix(".inter"), films, people)
    part = _split_by_time(ratings, 1 - valid - test, 1 - test)
    sizes = np.bincount(part, minlength=len(PARTS)).tolist()
    check_not_empty(directory, stem.name, dict(zip(PARTS, sizes, strict=True)))
    clicks = _impressions(films, people, ratings, part == 0).latest(max_history)
    train, valid_part, test_part = (clicks.select(torch.from_numpy(part == number)) for number in range(3))
    return Splits(stem.name, train, valid_part, test_part)


def _find_stem(directory: Path) -> Path:
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: wanted a directory with NAME.inter, NAME.item and NAME.user, found none")
    paths = sorted(directory.glob("*.inter"))
    if len(paths) != 1:
        names = ", ".join(path.name for path in paths) or "none"
        raise FileNotFoundError(f"{directory}: wanted exactly one file NAME.inter, found {names}")
    return paths[0].with_suffix("")


# ---------------------------------------------------------------- the three tables


def _index(table: Table, name: str) -> dict[str, int]:
    index: dict[str, int] = {}
    for row, key in enumerate(table[name]):
        if index.setdefault(key, row) != row:
            raise table.cell_error(row, name, f"names {short_repr(key)} a second time")
    return index


def _ids(values: Sequence[str]) -> tuple[Ints, int]:
    """Ids of the values, in sorted order of the distinct values, and the number of ids."""
    ids = {value: i for i, value in enumerate(sorted(set(values)))}
    return np.array([ids[value] for value in values], np.int64), len(ids)


def _read_films(path: Path) -> Films:
    table = read_atomic(path, {"item_id": "token", "release_year": "token", "class": "token_seq"})
    # Rare genres first: a film with more genres than fields is described least by the common ones.
    count: dict[str, int] = {}
    for genres in table["class"]:
        for genre in genres:
            count[genre] = count.get(genre, 0) + 1
    genre_id = {genre: i + 1 for i, genre in enumerate(sorted(count))}
    ids = np.zeros((len(table), GENRES), np.int64)
    for row, genres in enumerate(table["class"]):
        kept = sorted(set(genres), key=lambda genre: (count[genre], genre))[:GENRES]
        ids[row, : len(kept)] = [genre_id[genre] for genre in kept]
    year = np.empty(len(table), np.int64)
    for row, text in enumerate(table["release_year"]):
        if text.isdecimal() and len(text) > MAX_DIGITS:
            raise table.cell_error(
                row, "release_year", f"wanted a year of at most {MAX_DIGITS} digits, found {short_repr(text)}"
            )
        year[row] = _year_bucket(text)
    return Films(_index(table, "item_id"), year, ids, len(genre_id) + 1)


def _year_bucket(text: str) -> int:
    """0 for unknown, 1-7 for decades from before 1930 to the eighties, 8-47 for single years from 1990 to 2029."""
    if not text.isdecimal():
        return 0
    year = min(int(text), 2029)
    return year - 1990 + 8 if year >= 1990 else max(1, (year - 1930) // 10 + 2)


NUM_YEARS = 48
MAX_DIGITS = 4  # of a year or an age
AGES = (18, 25, 35, 45, 50, 56)  # lower bounds of the age buckets, MovieLens' own groups


def _read_people(path: Path) -> People:
    table = read_atomic(path, {"user_id": "token", "age": "token", "gender": "token", "occupation": "token"})
    ages = np.empty(len(table), np.int64)
    for row, text in enumerate(table["age"]):
        if not text.isdecimal() or len(text) > MAX_DIGITS:
            raise table.cell_error(row, "age", f"wanted an age in years, found {short_repr(text)}")
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
                raise table.cell_error(
                    row, name, f"names {short_repr(key)}, which is not in the table of users or items"
                )
        columns.append(np.array([index[key] for key in table[name]], np.int64))
    for row, rating in enumerate(table["rating"]):
        if not 1 <= rating <= 5:
            raise table.cell_error(row, "rating", f"wanted 1 to 5, found {rating:g}")
    for row, time in enumerate(table["timestamp"]):
        if abs(time) > MAX_TIME:
            raise table.cell_error(row, "timestamp", f"wanted seconds within {MAX_TIME:.0f}, found {time:g}")
    user, item = columns
    rating, time = np.array(table["rating"]), np.array(table["timestamp"])
    order = np.lexsort((item, time, user))
    return Ratings(user[order], item[order], rating[order], time[order])


# ---------------------------------------------------------------- impressions


def _starts(*keys: NDArray[Any]) -> NDArray[np.bool_]:
    """bool `[N]`, True where any key differs from the previous row: the start of a group of equal keys."""
    begin = np.zeros(len(keys[0]), bool)
    begin[:1] = True
    for key in keys:
        begin[1:] |= key[1:] != key[:-1]
    return begin


def _group_start(begin: NDArray[np.bool_]) -> Ints:
    """The index of the first row of each row's group, given by `_starts`."""
    return np.maximum.accumulate(np.where(begin, np.arange(len(begin)), 0))


def _split_by_time(ratings: Ratings, train: float, train_and_valid: float) -> Ints:
    """0, 1 or 2 (train, valid, test) for each rating; ratings of one user and time are in the part of their first."""
    first = _group_start(_starts(ratings.user))
    size = np.bincount(ratings.user)[ratings.user]
    share = (_group_start(_starts(ratings.user, ratings.time)) - first) / size  # of the user's ratings, before it
    return (share >= train).astype(np.int64) + (share >= train_and_valid)


def _popularity(ratings: Ratings, counted: NDArray[np.bool_]) -> tuple[Ints, NDArray[np.float64]]:
    """The numbers of `counted` ratings and of liked ones that each rating's film had at strictly earlier times."""
    order = np.lexsort((ratings.time, ratings.item))
    item, time = ratings.item[order], ratings.time[order]
    weight = counted[order].astype(np.float64)
    liked = weight * (ratings.rating[order] >= LIKED)
    first, group = _group_start(_starts(item)), _group_start(_starts(item, time))
    sums = []
    for value in (weight, liked):
        before = np.r_[0.0, np.cumsum(value)]
        out = np.empty(len(order))
        out[order] = before[group] - before[first]
        sums.append(out)
    return sums[0].astype(np.int64), sums[1]


def _gap_bucket(ratings: Ratings) -> Ints:
    """Time since the user's previous rating: 0 for the first, 1 for the same second, then powers of 4 s up to 11."""
    gap = np.diff(ratings.time, prepend=ratings.time[:1])
    bucket = 1 + np.ceil(np.log2(np.maximum(gap, 0) + 1) / 2).astype(np.int64)
    return np.where(_starts(ratings.user), 0, np.minimum(bucket, 11))


def _impressions(films: Films, people: People, ratings: Ratings, counted: NDArray[np.bool_]) -> Clicks:
    user, item = ratings.user, ratings.item
    level = np.rint(ratings.rating).astype(np.int64) - 1
    rated, liked = _popularity(ratings, counted)
    prior = float((ratings.rating[counted] >= LIKED).mean())
    first, last = _group_start(_starts(user)), _group_start(_starts(user, ratings.time))
    dense = np.stack((np.log1p(last - first) / 5, np.log1p(rated) / 5, (liked + 10 * prior) / (rated + 10) - prior), 1)
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
    counts = ("item_seen", "item_liked")
    return Schema(tables, ("history_length", *counts), plain + genres, events, candidate, candidate_dense=counts)
