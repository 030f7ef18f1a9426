"""Next-item clicks of Amazon Beauty: is this the user's next item, or one drawn by its popularity?

The file holds one line per user, `user item item ...` in time order, as whole numbers separated by blanks: the form in
which sequential recommenders distribute the 5-core set (`Beauty.txt`). Nothing is downloaded.

Positives: every item of a user except the first, which has no history. The user's last item is test, the one before it
validation, the earlier ones training. Each positive is followed by negatives of the same user with the same history.
A part's negatives are drawn in proportion to how often an item is a positive of that part, so that popularity tells
nothing about the label there. (Late clicks go to newer items: if the test part's negatives were drawn by training
counts, "rare in training" would predict the label with an AUC of 0.63.) `facts["popularity_auc"]` is the test AUC of
the training count alone. An item of the user, earlier or later, is never a negative.
No leakage: the history holds the strictly earlier items, and counts come from the training part. They include the
impression's own click; excluding it would give a training positive a lower count and so reveal the label.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from interformer import checks
from interformer.checks import short_repr
from interformer.data.clicks import Clicks, Splits
from interformer.data.errors import MalformedFileError
from interformer.metrics import auc
from interformer.schema import Field, Schema

FILE = "Beauty.txt"
TRIES = 16  # rounds of rejection sampling; most users need one or two
MAX_DIGITS = 18  # whole numbers with this many digits fit int64
Ints = NDArray[np.int64]
TRAIN, VALID, TEST = PARTS = range(3)


class Streams(NamedTuple):
    """All events `[V]` in the file's order; users and items are renumbered from 0, in ascending order of their ids."""

    user: Ints
    item: Ints
    position: Ints  # index of the event in its user's line
    length: Ints  # number of events of its user
    users: int
    items: int


def read_beauty(path: Path | str, *, max_history: int = 50, negatives: int = 1, seed: int = 0) -> Splits:
    """The three parts of the file `path`, or of `Beauty.txt` in the directory `path`.

    Args:
        max_history: number of last items that a history keeps.
        negatives: number of sampled negatives of each positive, which follow it in the part. Draws are independent: an
            item may be drawn twice.
        seed: seed of the negatives; the same seed gives the same bits on every machine.

    Raises:
        FileNotFoundError: there is no such file.
        MalformedFileError: a cell is not a whole number, or a user has no items or a second line; with file, line and
            column.
        ValueError: a wrong argument; no user has four items, so there is nothing to train on; or a user has every item
            that can be drawn, so there is no negative.
    """
    for name, value in (("max_history", max_history), ("negatives", negatives)):
        checks.kind(f"read_beauty: {name}", value, int)
    if not (1 <= max_history <= checks.LARGEST and 1 <= negatives <= checks.LARGEST):
        expected = "read_beauty: wanted max_history >= 1 and negatives >= 1, neither of them above 2^31 - 1"
        raise ValueError(f"{expected}; found {short_repr(max_history)} and {short_repr(negatives)}")
    checks.seed("read_beauty: seed", seed)
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    streams = _read_streams(path)
    remaining = streams.length - 1 - streams.position  # number of later events of the user
    part = np.where(remaining == 0, TEST, np.where(remaining == 1, VALID, TRAIN))
    positive = streams.position > 0
    count = np.stack([np.bincount(streams.item[positive & (part == p)], minlength=streams.items) for p in PARTS])
    if not count[TRAIN].any():
        raise ValueError(f"{path}: wanted at least one user with four items, to have a training click; found none")
    clicks = _impressions(streams, positive, part, count, negatives, seed).latest(max_history)
    part_of_click = np.repeat(part[positive], negatives + 1)
    train, valid, test = (clicks.select(torch.from_numpy(part_of_click == p)) for p in PARTS)
    popularity = auc(test.label, test.dense[:, 1])
    return Splits(path.stem.lower(), train, valid, test, facts={"popularity_auc": popularity})


# ---------------------------------------------------------------- the file


def _read_streams(path: Path) -> Streams:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted one line per user, `user item item ...`")
    users: dict[int, int] = {}
    items: list[int] = []
    lengths: list[int] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            cells = line.split()
            if not cells:
                continue
            user, *stream = (_whole(path, number, column, cell) for column, cell in enumerate(cells, 1))
            if users.setdefault(user, number) != number:
                raise MalformedFileError(
                    path, number, 1, f"wanted each user once, found {user} as in line {users[user]}"
                )
            if not stream:
                raise MalformedFileError(path, number, 1, f"wanted items after the user, found none for {user}")
            items.extend(stream)
            lengths.append(len(stream))
    keys, item = np.unique(np.array(items, np.int64), return_inverse=True)
    row = np.argsort(np.argsort(np.array(list(users), np.int64)))
    length = np.array(lengths, np.int64)
    start = np.cumsum(length) - length
    position = np.arange(len(items)) - np.repeat(start, length)
    return Streams(np.repeat(row, length), item, position, np.repeat(length, length), len(users), len(keys))


def _whole(path: Path, line: int, column: int, cell: bytes) -> int:
    if not cell.isdigit() or len(cell) > MAX_DIGITS:
        text = cell.decode("utf-8", "backslashreplace")
        expected = f"wanted a whole number of at most {MAX_DIGITS} digits"
        raise MalformedFileError(path, line, column, f"{expected}, found {short_repr(text)}")
    return int(cell)


# ---------------------------------------------------------------- impressions


def _draw_negatives(streams: Streams, user: Ints, count: Ints, rng: np.random.Generator) -> Ints:
    """An item for each entry of `user` that the user does not have, drawn in proportion to `count [items]`."""
    owned = np.unique(streams.user * streams.items + streams.item)  # sorted keys (user, item)
    drawable = count > 0
    num_owned = np.bincount(owned // streams.items, drawable[owned % streams.items], minlength=streams.users)
    if (num_owned[user] == drawable.sum()).any():
        expected = "read_beauty: wanted for every user an item to draw as a negative"
        raise ValueError(f"{expected}, found one who has all {drawable.sum()} positive items of a part")
    cumulative = np.cumsum(count)
    drawn = np.empty(len(user), np.int64)
    pending = np.arange(len(user))
    for _ in range(TRIES):
        if not len(pending):
            return drawn
        ticket = rng.integers(cumulative[-1], size=len(pending))
        drawn[pending] = np.searchsorted(cumulative, ticket, side="right")
        key = user[pending] * streams.items + drawn[pending]
        pending = pending[np.isin(key, owned)]
    drawn[pending] = _draw_exactly(owned, user[pending], cumulative, count, rng)
    return drawn


def _draw_exactly(owned: Ints, user: Ints, cumulative: Ints, count: Ints, rng: np.random.Generator) -> Ints:
    """The same distribution without rejection, for users who own nearly all drawable items.

    Item `j` has the tickets from `cumulative[j] - count[j]` to `cumulative[j]`. The tickets of the user's own items are
    cut out of this line, and a ticket drawn from the shortened line is shifted by the length of the cuts before it.
    """
    owner, item = owned // len(count), owned % len(count)
    begin = np.flatnonzero(np.diff(owner, prepend=-1))  # Every user has items; those of user `u` begin at `begin[u]`.
    cut = np.r_[0, np.cumsum(count[item])]
    cut_length = np.diff(np.r_[cut[begin], cut[-1]])  # total length of each user's cuts
    cut_start = cumulative[item] - count[item] - (cut[:-1] - cut[begin[owner]])  # on the shortened line
    ticket = rng.integers(cumulative[-1] - cut_length[user])
    stride = cumulative[-1] + 1
    before = np.searchsorted(owner * stride + cut_start, user * stride + ticket, side="right")  # cuts up to the ticket
    drawn: Ints = np.searchsorted(cumulative, ticket + cut[before] - cut[begin[user]], side="right")
    return drawn


def _impressions(
    streams: Streams, positive: NDArray[np.bool_], part: Ints, count: Ints, negatives: int, seed: int
) -> Clicks:
    """Each of the `positive [V]` events followed by its negatives, drawn by its part's `count [parts, items]`."""
    positives = np.flatnonzero(positive)
    user = np.repeat(streams.user[positives], negatives + 1)
    item = np.repeat(streams.item[positives], negatives + 1)
    label = np.arange(len(item)) % (negatives + 1) == 0
    rng = np.random.default_rng(seed)
    for p in PARTS:
        negative = ~label & (np.repeat(part[positives], negatives + 1) == p)
        item[negative] = _draw_negatives(streams, user[negative], count[p], rng)
    last = np.repeat(positives, negatives + 1)
    length = np.repeat(streams.position[positives], negatives + 1)
    dense = np.stack((np.log1p(length) / 5, np.log1p(count[TRAIN, item]) / 5), 1)
    fields = Field("user", "user"), Field("item", "item")
    tables = {"user": streams.users, "item": streams.items}
    return Clicks(
        schema=Schema(
            tables, ("history_length", "item_count"), fields, fields[1:], ("item",), candidate_dense=("item_count",)
        ),
        dense=torch.from_numpy(dense.astype(np.float32)),
        categorical=torch.from_numpy(np.stack((user, item), 1)),
        events=torch.from_numpy(streams.item[:, None]),
        first=torch.from_numpy(last - length),
        last=torch.from_numpy(last),
        label=torch.from_numpy(label.astype(np.float32)),
        user=torch.from_numpy(user),
    )
