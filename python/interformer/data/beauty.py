"""Next-item clicks of Amazon Beauty: is this the user's next item, or one drawn by its popularity?

The file holds one line a user, `user item item ...` in time order, blanks between, all of them whole numbers: the form
in which sequential recommenders pass the 5-core set around (`Beauty.txt`). Nothing is downloaded.

Positives: every item but the user's first, which nothing precedes. The user's last item is test, the one before it
validation, the earlier ones training. Each positive comes with negatives of the same user and the same history.
A part's negatives are drawn in proportion to how often an item is a positive of that part, so that an item's popularity
says nothing of the label there. (Late clicks go to newer items: negatives of the test part drawn by the counts of the
training part would be told by their high counts, with an AUC of 0.63 for "rare in training".) `facts["popularity_auc"]`
is the test AUC of the training count alone. An item of the user, earlier or later, is never a negative.
No leakage: the history holds the items strictly before, and counts come from the training part. They cover all of it,
the impression's own click too: to leave that one out would tell a training positive by its lower count.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from interformer import checks
from interformer.checks import shown
from interformer.data.clicks import Clicks, Splits
from interformer.data.errors import MalformedFileError
from interformer.metrics import auc
from interformer.schema import Field, Schema

FILE = "Beauty.txt"
TRIES = 16  # rounds in which own items are drawn and thrown away; most users need one or two
LARGEST_DIGITS = 18  # whole numbers of so many digits fit int64
Ints = NDArray[np.int64]
TRAIN, VALID, TEST = PARTS = range(3)


class Streams(NamedTuple):
    """All events `[V]` in the file's order, users and items numbered from 0 in the order of their numbers there."""

    user: Ints
    item: Ints
    place: Ints  # index of the event in its user's line
    length: Ints  # events of its user
    users: int
    items: int


def read_beauty(path: Path | str, *, max_history: int = 50, negatives: int = 1, seed: int = 0) -> Splits:
    """The three parts of the file `path`, or of `Beauty.txt` in the directory `path`.

    Args:
        max_history: histories keep their last so many items.
        negatives: sampled negatives of each positive, which follow it in the part. Draws are independent: one item may
            come twice.
        seed: of the negatives; the same seed gives the same bits on every machine.

    Raises:
        FileNotFoundError: no such file.
        MalformedFileError: naming file, line and column: a cell that is no whole number, a user without items or a
            second time.
        ValueError: a bad argument; no user with four items, so nothing to train on; a user who has every item that can
            be drawn, so no negative.
    """
    for name, value in (("max_history", max_history), ("negatives", negatives)):
        checks.kind(f"read_beauty: {name}", value, int)
    if not (1 <= max_history <= checks.LARGEST and 1 <= negatives <= checks.LARGEST):
        wanted = "read_beauty: wanted max_history >= 1 and negatives >= 1, neither of them above 2^31 - 1"
        raise ValueError(f"{wanted}; found {shown(max_history)} and {shown(negatives)}")
    checks.seed("read_beauty: seed", seed)
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    streams = _read_streams(path)
    left = streams.length - 1 - streams.place  # events of the user that follow
    part = np.where(left == 0, TEST, np.where(left == 1, VALID, TRAIN))
    positive = streams.place > 0
    count = np.stack([np.bincount(streams.item[positive & (part == p)], minlength=streams.items) for p in PARTS])
    if not count[TRAIN].any():
        raise ValueError(f"{path}: wanted at least one user with four items, to have a training click; found none")
    clicks = _impressions(streams, positive, part, count, negatives, seed).latest(max_history)
    part_of_click = np.repeat(part[positive], negatives + 1)
    train, valid, test = (clicks.select(torch.from_numpy(part_of_click == which)) for which in PARTS)
    popularity = auc(test.label, test.dense[:, 1])
    return Splits(path.stem.lower(), train, valid, test, facts={"popularity_auc": popularity})


# ---------------------------------------------------------------- the file


def _read_streams(path: Path) -> Streams:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted one line a user, `user item item ...`")
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
    place = np.arange(len(items)) - np.repeat(start, length)
    return Streams(np.repeat(row, length), item, place, np.repeat(length, length), len(users), len(keys))


def _whole(path: Path, line: int, column: int, cell: bytes) -> int:
    if not cell.isdigit() or len(cell) > LARGEST_DIGITS:
        found = cell.decode("utf-8", "backslashreplace")
        wanted = f"wanted a whole number of at most {LARGEST_DIGITS} digits"
        raise MalformedFileError(path, line, column, f"{wanted}, found {shown(found)}")
    return int(cell)


# ---------------------------------------------------------------- impressions


def _draw_negatives(streams: Streams, user: Ints, count: Ints, rng: np.random.Generator) -> Ints:
    """For each entry of `user` an item that is none of that user's, drawn in proportion to `count [items]`."""
    owned = np.unique(streams.user * streams.items + streams.item)
    drawable = count > 0
    has = np.bincount(owned // streams.items, drawable[owned % streams.items], minlength=streams.users)
    full = np.flatnonzero(has[user] == drawable.sum())
    if len(full):
        wanted = "read_beauty: wanted for every user an item to draw as a negative"
        raise ValueError(f"{wanted}, found one who has all {drawable.sum()} positive items of a part")
    upto = np.cumsum(count)
    drawn = np.empty(len(user), np.int64)
    open_places = np.arange(len(user))
    for _ in range(TRIES):
        if not len(open_places):
            return drawn
        ticket = rng.integers(upto[-1], size=len(open_places))
        drawn[open_places] = np.searchsorted(upto, ticket, side="right")
        key = user[open_places] * streams.items + drawn[open_places]
        open_places = open_places[np.isin(key, owned)]
    drawn[open_places] = _draw_among_others(owned, user[open_places], upto, count, rng)
    return drawn


def _draw_among_others(owned: Ints, user: Ints, upto: Ints, count: Ints, rng: np.random.Generator) -> Ints:
    """The same draw without a second try, for users whose own items are nearly all that is drawn.

    On the line of all tickets (item `j` has those from `upto[j] - count[j]` to `upto[j]`) the user's own items are cut
    out; a ticket of what is left is moved up by the length of the cuts before it.
    """
    owner, item = owned // len(count), owned % len(count)
    begin = np.flatnonzero(np.diff(owner, prepend=-1))  # every user has items: of user `u` they begin at `begin[u]`
    cut = np.r_[0, np.cumsum(count[item])]
    total = np.diff(np.r_[cut[begin], cut[-1]])  # of each user's cuts
    place = upto[item] - count[item] - (cut[:-1] - cut[begin[owner]])  # of each cut on the shortened line
    ticket = rng.integers(upto[-1] - total[user])
    stride = upto[-1] + 1
    before = np.searchsorted(owner * stride + place, user * stride + ticket, side="right")  # cuts up to the ticket
    found: Ints = np.searchsorted(upto, ticket + cut[before] - cut[begin[user]], side="right")
    return found


def _impressions(
    streams: Streams, positive: NDArray[np.bool_], part: Ints, count: Ints, negatives: int, seed: int
) -> Clicks:
    """Each of the `positive [V]` events with its negatives after it, drawn by its part's `count [parts, items]`."""
    positives = np.flatnonzero(positive)
    user = np.repeat(streams.user[positives], negatives + 1)
    item = np.repeat(streams.item[positives], negatives + 1)
    label = np.arange(len(item)) % (negatives + 1) == 0
    rng = np.random.default_rng(seed)
    for which in PARTS:
        drawn = ~label & (np.repeat(part[positives], negatives + 1) == which)
        item[drawn] = _draw_negatives(streams, user[drawn], count[which], rng)
    last = np.repeat(positives, negatives + 1)
    length = np.repeat(streams.place[positives], negatives + 1)
    dense = np.stack((np.log1p(length) / 5, np.log1p(count[TRAIN, item]) / 5), 1)
    fields = Field("user", "user"), Field("item", "item")
    tables = {"user": streams.users, "item": streams.items}
    return Clicks(
        schema=Schema(tables, ("history_length", "item_count"), fields, fields[1:], candidate=("item",)),
        dense=torch.from_numpy(dense.astype(np.float32)),
        categorical=torch.from_numpy(np.stack((user, item), 1)),
        events=torch.from_numpy(streams.item[:, None]),
        first=torch.from_numpy(last - length),
        last=torch.from_numpy(last),
        label=torch.from_numpy(label.astype(np.float32)),
        user=torch.from_numpy(user),
    )
