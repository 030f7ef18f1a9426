"""Amazon Beauty as next-item clicks, on files written by the tests, and on the real file if it is available."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from interformer.data import Clicks, MalformedFileError, Splits, read_beauty
from interformer.metrics import auc
from real_data import real_data

Streams = dict[int, list[int]]


def _write(path: Path, streams: Streams) -> Path:
    file = path / "Beauty.txt"
    file.write_text("".join(f"{user} {' '.join(map(str, items))}\n" for user, items in streams.items()))
    return file


def _random_streams(seed: int, users: int = 30, items: int = 40) -> Streams:
    """Ids with gaps, users out of order, streams of 1 to 12 items, some of them repeated."""
    rng = random.Random(seed)
    numbers = rng.sample(range(1, 500), items)
    popular = [numbers[min(int(rng.expovariate(0.1)), items - 1)] for _ in range(200)]
    return {user: rng.choices(popular, k=rng.randint(1, 12)) for user in rng.sample(range(900), users)}


def _rows(clicks: Clicks) -> list[tuple[int, int, bool, list[int]]]:
    """(user, item, label, history) of every impression."""
    rows = []
    for i in range(len(clicks)):
        batch = clicks.batch(torch.tensor([i]))
        assert batch.user.item() == batch.categorical[0, 0].item()
        user, item = batch.categorical[0].tolist()
        rows.append((user, item, bool(batch.label.item()), batch.sequences[:, 0].tolist()))
    return rows


def _numbered(streams: Streams) -> Streams:
    """The streams with users and items numbered from 0, as by the reader."""
    users = {user: i for i, user in enumerate(sorted(streams))}
    items = {item: i for i, item in enumerate(sorted({item for stream in streams.values() for item in stream}))}
    return {users[user]: [items[item] for item in stream] for user, stream in streams.items()}


@pytest.mark.parametrize("seed", range(3))
def test_the_last_item_is_test_the_one_before_validation_and_the_first_no_click(tmp_path: Path, seed: int) -> None:
    streams = _random_streams(seed)
    splits = read_beauty(_write(tmp_path, streams))
    expected: dict[str, list[tuple[int, int, list[int]]]] = {"train": [], "valid": [], "test": []}
    for user, items in _numbered(streams).items():
        for place in range(1, len(items)):
            part = {1: "test", 2: "valid"}.get(len(items) - place, "train")
            expected[part].append((user, items[place], items[:place]))
    assert all(expected.values())
    for name, part in splits.parts().items():
        positives = [(user, item, history) for user, item, label, history in _rows(part) if label]
        assert positives == expected[name]


@pytest.mark.parametrize("negatives", [1, 3])
def test_negatives_are_items_of_others_with_the_history_of_their_positive(tmp_path: Path, negatives: int) -> None:
    streams = _random_streams(3)
    splits = read_beauty(_write(tmp_path, streams), negatives=negatives)
    owned = {user: set(items) for user, items in _numbered(streams).items()}
    for part in splits.parts().values():
        rows = _rows(part)
        positives = {item for _, item, label, _ in rows if label}
        assert part.rate() == pytest.approx(1 / (1 + negatives))
        for start in range(0, len(rows), negatives + 1):
            positive, *sampled_negatives = rows[start : start + negatives + 1]
            assert positive[2]
            for user, item, label, history in sampled_negatives:
                assert (user, label, history) == (positive[0], False, positive[3])
                assert item in positives - owned[user]


def test_negatives_follow_the_counts_of_positives_in_their_part(tmp_path: Path) -> None:
    """Two items occur at 3 to 1 among a thousand users, and so do the other users' negatives."""
    streams = {user: [1, 4, 5, 2 if user % 4 else 3] for user in range(1000)}
    streams |= {user: [6, 7, 8, 9] for user in range(1000, 3000)}
    splits = read_beauty(_write(tmp_path, streams))
    drawn = Counter(item for user, item, label, _ in _rows(splits.test) if user >= 1000 and not label)
    two, three = drawn[1], drawn[2]  # items 2 and 3, numbered from 0
    assert two + three == 2000
    assert abs(two - 1500) < 5 * math.sqrt(2000 * 0.75 * 0.25)  # five standard deviations


def test_features_are_the_length_of_the_history_and_the_count_in_training(tmp_path: Path) -> None:
    streams = _random_streams(5)
    splits = read_beauty(_write(tmp_path, streams), max_history=4)
    count = Counter(item for items in _numbered(streams).values() for item in items[1:-2])
    places = {user: len(items) for user, items in _numbered(streams).items()}
    assert splits.schema.dense == ("history_length", "item_count")
    for row, dense in zip(_rows(splits.test), splits.test.dense.tolist(), strict=True):
        user, item, _, history = row
        assert len(history) == min(places[user] - 1, 4)
        assert dense == pytest.approx([math.log1p(places[user] - 1) / 5, math.log1p(count[item]) / 5])
    assert splits.facts["popularity_auc"] == pytest.approx(
        auc(splits.test.label, [count[item] for _, item, _, _ in _rows(splits.test)])
    )


def test_the_inputs_of_training_positives_know_nothing_of_what_is_held_out(tmp_path: Path) -> None:
    """Every user gets the last two items of the next one."""
    streams = _random_streams(6)
    users = [user for user, items in streams.items() if len(items) > 2]
    changed = streams | {
        user: [*streams[user][:-2], *streams[next_user][-2:]]
        for user, next_user in zip(users, [*users[1:], users[0]], strict=True)
    }
    assert changed != streams
    before, after = (read_beauty(_write(tmp_path, items_of)) for items_of in (streams, changed))
    assert not torch.equal(before.test.categorical, after.test.categorical)
    first, second = (splits.train.select(splits.train.label == 1) for splits in (before, after))
    assert torch.equal(first.dense, second.dense)
    assert _rows(first) == _rows(second)


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    file = _write(tmp_path, _random_streams(7))
    first, repeated, of_other_seed = (read_beauty(file, seed=seed).train.categorical for seed in (1, 1, 2))
    np.random.seed(3)
    assert torch.equal(first, repeated)
    assert torch.equal(first, read_beauty(tmp_path, seed=1).train.categorical)
    assert not torch.equal(first, of_other_seed)


def test_models_that_compare_find_the_candidate(tmp_path: Path) -> None:
    schema = read_beauty(_write(tmp_path, _random_streams(0))).schema
    assert schema.candidate == ("item",)
    assert [field.name for field in schema.sequences] == ["item"]
    assert len({field.table for field in (*schema.sequences, schema.categorical[1])}) == 1


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (b"1 2 3\n4 5 x6\n", "2:3", "wanted a whole number of at most 18 digits, found 'x6'"),
        (b"1 2 3\n\n4 5 -6\n", "3:3", "found '-6'"),
        (b"1 2 3.0\n", "1:3", "found '3.0'"),
        (b"one 2 3\n", "1:1", "found 'one'"),
        (b"1 2 \xff3\n", "1:3", r"found '\\xff3'"),
        (b"1 " + b"9" * 19 + b"\n", "1:2", "at most 18 digits"),
        (b"1 2 3\n4\n", "2:1", "wanted items after the user, found none for 4"),
        (b"1 2 3\n4 5\n1 6\n", "3:1", "wanted each user once, found 1 as in line 1"),
    ],
)
def test_malformed_files_are_named_with_line_and_column(tmp_path: Path, text: bytes, place: str, message: str) -> None:
    file = tmp_path / "some.txt"
    file.write_bytes(text)
    with pytest.raises(MalformedFileError) as caught:
        read_beauty(file)
    assert str(caught.value).startswith(f"{file}:{place}: ")
    assert message in str(caught.value)


def test_what_cannot_be_learned_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Beauty\.txt: no such file; wanted one line per user"):
        read_beauty(tmp_path)
    with pytest.raises(ValueError, match="wanted at least one user with four items"):
        read_beauty(_write(tmp_path, {1: [2, 3, 4], 2: [3]}))
    with pytest.raises(ValueError, match="found one who has all 2 positive items of a part"):
        read_beauty(_write(tmp_path, {1: [1, 2, 3, 4], 2: [1, 3, 2, 4], 3: [5, 6, 7]}))


@pytest.mark.parametrize("options", [{"max_history": 0}, {"negatives": 0}])
def test_bad_options_are_named(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="wanted max_history >= 1 and negatives >= 1"):
        read_beauty(_write(tmp_path, _random_streams(0)), **options)


# ---------------------------------------------------------------- the real data


@pytest.fixture(scope="module")
def beauty() -> Splits:
    return read_beauty(real_data("amazon-beauty", "Beauty.txt"))


def test_amazon_beauty(beauty: Splits) -> None:
    assert beauty.name == "beauty"
    assert beauty.schema.tables == {"user": 22363, "item": 12101}
    assert {name: len(part) for name, part in beauty.parts().items()} == {
        "train": 2 * (198_502 - 3 * 22_363),
        "valid": 2 * 22_363,
        "test": 2 * 22_363,
    }
    assert beauty.test.lengths.max() == 50
    assert auc(beauty.train.label, beauty.train.dense[:, 1]) == pytest.approx(0.5, abs=0.005)


def test_the_negatives_of_amazon_beauty_are_the_same_everywhere(beauty: Splits) -> None:
    digest = hashlib.sha256(beauty.test.categorical.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest.startswith("2f99bff3a3e26ef2")
