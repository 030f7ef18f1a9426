"""Impressions with histories, stored compactly, and batches of them.

Axes: `N` impressions, `V` events of all users, `k` fields of an event, `B` rows and `T` tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from interformer.batch import Batch
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
    """

    schema: Schema
    dense: Tensor
    categorical: Tensor
    events: Tensor
    first: Tensor
    last: Tensor
    label: Tensor
    user: Tensor

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
        names = ("dense", "categorical", "first", "last", "label", "user")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def batch(self, rows: Tensor) -> Batch:
        """The impressions `rows [B]` as a batch."""
        first, length = self.first[rows], self.lengths[rows]
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int64)
        torch.cumsum(length, 0, out=offsets[1:])
        steps = torch.arange(int(offsets[-1])) + torch.repeat_interleave(first - offsets[:-1], length)
        categorical, events, user = (
            ids.long() for ids in (self.categorical[rows], self.events[steps], self.user[rows])
        )
        return Batch(self.dense[rows], categorical, events, offsets, self.label[rows], user)

    def latest(self, length: int) -> Clicks:
        """The same impressions with only the last `length` events of every history."""
        return replace(self, first=torch.maximum(self.first, self.last - length))

    def without_history(self) -> Clicks:
        """The same impressions with empty histories, as for a model without sequences."""
        return replace(self, first=self.last)

    def with_shuffled_history(self, seed: int) -> Clicks:
        """The same impressions with each history shuffled independently; copies the histories."""
        batch = self.batch(torch.arange(len(self)))
        row = torch.repeat_interleave(torch.arange(len(self)), self.lengths)
        keys = torch.rand(len(row), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        order = torch.argsort(row + keys)
        return replace(self, events=batch.sequences[order], first=batch.offsets[:-1], last=batch.offsets[1:])

    def batches(self, size: int, *, seed: int | None = None, pool: int = 16) -> Iterator[Batch]:
        """All impressions in batches of `size` (the last may be smaller) of rows of similar length.

        With a seed the order is random: impressions are shuffled, sorted by length inside pools of `pool` batches, and
        the batches shuffled. It depends on the seed alone. Without one, batches go from short histories to long ones.
        """
        for rows in self.batch_rows(size, seed=seed, pool=pool):
            yield self.batch(rows)

    def batch_rows(self, size: int, *, seed: int | None = None, pool: int = 16) -> list[Tensor]:
        """The indices of the impressions in each batch of `batches`."""
        if seed is None:
            return list(torch.argsort(self.lengths, stable=True).split(size))
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(len(self), generator=generator)
        rows: list[Tensor] = []
        for pooled in shuffled.split(size * pool):
            rows.extend(pooled[torch.argsort(self.lengths[pooled], stable=True)].split(size))
        return [rows[i] for i in torch.randperm(len(rows), generator=generator)]


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
