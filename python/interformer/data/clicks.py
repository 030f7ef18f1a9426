"""Impressions with histories, stored compactly, and batches of them.

Axes: `N` impressions, `V` events of all users, `k` fields of an event, `B` rows and `T` tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from interformer.batch import Batch, spans
from interformer.data.balance import balanced, cost_of
from interformer.schema import Schema


@dataclass(frozen=True)
class Clicks:
    """`N` impressions whose histories are spans of one table of events, so that no history is stored twice.

    Args:
        schema: the meaning of the columns.
        dense: `[N, n_dense]` float32.
        categorical: `[N, n_cat]` int64, or int32 to save memory; batches are int64.
        events: `[V, k]` int64 or int32: the events of each user (or each impression) in a row, oldest first.
        first, last: `[N]` int64: the history of impression `i` is `events[first[i]:last[i]]`; it may be empty.
        label: `[N]` float32, 0 or 1.
        user: `[N]` int64 or int32.
        request: `[N]` int64 or int32: the request of each impression; those of one request have one history, and one
            value of each field that is not the candidate's. None: every impression is a request of its own.
        event_time, time: whole numbers `[V]` and `[N]`, both or neither: when events and impressions were. Then batches
            have one more column of events, the last of the schema: the number of `age_edges`, ascending, that an
            event's age `time - event_time` has reached.
    """

    schema: Schema
    dense: Tensor
    categorical: Tensor
    events: Tensor
    first: Tensor
    last: Tensor
    label: Tensor
    user: Tensor
    request: Tensor | None = None
    event_time: Tensor | None = None
    time: Tensor | None = None
    age_edges: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.label.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Length of every history, `[N]`."""
        return self.last - self.first

    def rate(self) -> float:
        """Mean label."""
        return float(self.label.mean(dtype=torch.float64))

    def select(self, rows: Tensor) -> Clicks:
        """The impressions `rows` (indices or mask) over the same events."""
        names = ("dense", "categorical", "first", "last", "label", "user", "request", "time")
        return replace(self, **{name: x[rows] for name in names if (x := getattr(self, name)) is not None})

    def batch(self, rows: Tensor) -> Batch:
        """The impressions `rows [B]` as a batch, in which those of one request share its history."""
        requests, of_request = self._requests(rows)
        offsets, steps = spans(self.first[requests], self.lengths[requests])
        categorical, events, user = (
            ids.long() for ids in (self.categorical[rows], self.events[steps], self.user[rows])
        )
        if self.event_time is not None and self.time is not None:
            age = self.time[requests].repeat_interleave(offsets.diff()) - self.event_time[steps]
            edges = torch.tensor(self.age_edges, dtype=age.dtype)
            events = torch.cat((events, torch.bucketize(age, edges, right=True)[:, None]), 1)
        shared = None if self.request is None else of_request
        return Batch(self.dense[rows], categorical, events, offsets, self.label[rows], user, shared)

    def latest(self, length: int) -> Clicks:
        """The same impressions with only the last `length` events of every history."""
        return replace(self, first=torch.maximum(self.first, self.last - length))

    def without_history(self) -> Clicks:
        """The same impressions with empty histories, as for a model without sequences."""
        return replace(self, first=self.last)

    def with_shuffled_history(self, seed: int) -> Clicks:
        """The same impressions with each history shuffled independently; copies the histories, whose ages stay."""
        requests, of_request = self._requests(torch.arange(len(self)))
        offsets, steps = spans(self.first[requests], self.lengths[requests])
        row = torch.repeat_interleave(offsets.diff())
        keys = torch.rand(len(row), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        events, time = self.events[steps[torch.argsort(row + keys)]], self.event_time
        return replace(
            self, events=events, first=offsets[of_request], last=offsets[of_request + 1],
            event_time=None if time is None else time[steps],
        )  # fmt: skip

    def _requests(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The first impression of each request among `rows`, and the place among those of each row's request."""
        if self.request is None:
            return rows, torch.arange(len(rows))
        first, of_request = first_of_each(self.request[rows])
        return rows[first], of_request

    def batches(self, size: int, *, seed: int | None = None, pool: int = 16) -> Iterator[Batch]:
        """All impressions in batches of `size` (the last may be smaller) of rows of similar length.

        Impressions of one request stay together: a batch has at most `size` of them, or all of a larger request.

        With a seed the order is random: impressions are shuffled, sorted by length inside pools of `pool` batches, and
        the batches shuffled. It depends on the seed alone. Without one, batches go from short histories to long ones.
        """
        for rows in self.batch_rows(size, seed=seed, pool=pool):
            yield self.batch(rows)

    def batch_rows(self, size: int, *, seed: int | None = None, pool: int = 16) -> list[Tensor]:
        """The indices of the impressions in each batch of `batches`."""
        groups = _Groups(len(self), self.request)
        lengths = self.lengths[groups.first]
        if seed is None:
            return [groups.impressions(part) for part in groups.cut(torch.argsort(lengths, stable=True), size)]
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(len(lengths), generator=generator)
        rows: list[Tensor] = []
        for pooled in groups.cut(shuffled, size * pool):
            by_length = pooled[torch.argsort(lengths[pooled], stable=True)]
            rows.extend(map(groups.impressions, groups.cut(by_length, size)))
        return [rows[i] for i in torch.randperm(len(rows), generator=generator)]

    def split(self, rows: Tensor, parts: int) -> list[Tensor]:
        """The impressions `rows` in parts of nearly equal cost, those of one request in one part."""
        if parts == 1:
            return [rows]
        groups = _Groups(len(rows), None if self.request is None else self.request[rows])
        costs = cost_of(self.lengths[rows[groups.first]], groups.counts)
        return [rows[groups.impressions(part)] for part in balanced(costs, parts)]


class _Groups:
    """Impressions `0 .. N-1` that stay together: those of one request; without requests, each by itself.

    Attributes:
        first: the first impression of each group.
        counts: impressions of each group.
    """

    def __init__(self, impressions: int, request: Tensor | None) -> None:
        self.first = torch.arange(impressions)
        self.counts = torch.ones_like(self.first)
        self.order: Tensor | None = None
        if request is not None:
            of = torch.unique(request, return_inverse=True)[1]
            self.order = torch.argsort(of, stable=True)
            self.counts = torch.bincount(of)
            self.ends = self.counts.cumsum(0)
            self.first = self.order[self.ends - self.counts]

    def impressions(self, groups: Tensor) -> Tensor:
        """The impressions of these groups, one group after another."""
        if self.order is None:
            return groups
        return self.order[spans((self.ends - self.counts)[groups], self.counts[groups])[1]]

    def cut(self, groups: Tensor, size: int) -> list[Tensor]:
        """Successive parts of the groups, of at most `size` impressions or one group each."""
        if self.order is None:
            return list(groups.split(size))
        ends, held = [0], 0
        for i, count in enumerate(self.counts[groups].tolist()):
            if held and held + count > size:
                ends.append(i)
                held = 0
            held += count
        return [groups[start:end] for start, end in pairwise((*ends, len(groups)))]


def first_of_each(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The index of the first member of each group, ascending, and the place among them of each member's group."""
    numbers, of = torch.unique(groups, return_inverse=True)
    first = torch.zeros(len(numbers), dtype=torch.int64)
    first, order = first.scatter_reduce(0, of, torch.arange(len(groups)), "amin", include_self=False).sort()
    return first, torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))[of]


@dataclass(frozen=True)
class Splits:
    """One data set in three parts; `facts` holds figures of it to report (an oracle's AUC, for example)."""

    name: str
    train: Clicks
    valid: Clicks
    test: Clicks
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def schema(self) -> Schema:
        return self.train.schema

    def parts(self) -> dict[str, Clicks]:
        return {"train": self.train, "valid": self.valid, "test": self.test}


def check_not_empty(path: object, name: str, sizes: Mapping[str, int]) -> None:
    """Raise if a part of the data set `name` has no rows; `path` begins the message."""
    for part, size in sizes.items():
        if not size:
            raise ValueError(f"{path}: wanted rows in each part of {name!r}; {part} has none")
