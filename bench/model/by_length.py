"""The padded model in buckets of similar length: rows sorted by length, each bucket padded to its own longest row.

All rows share one look-up of embeddings, so that each table gets one gradient, and one loss. Between the two, each
bucket is a call of the padded model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from interformer import InterFormerConfig, Schema
from interformer.batch import Batch
from interformer.embedding import Embedding
from interformer_bench.model.padded import PaddedInterFormer
from torch import Tensor

# The cost of a bucket's call, in tokens, and the length at which a token's attention costs as much as its other work;
# three times or a third of the first changes a step by a tenth.
_CALL, _ATTENTION = 2000, 2000


@dataclass(frozen=True)
class Bucket:
    """Rows that are padded together.

    Attributes:
        places: `[rows * L]`: the event of the packed batch at each place; at padding an arbitrary one.
        offsets: `[rows + 1]`, of the rows' own lengths.
        full: whether all rows are equally long.
    """

    places: Tensor
    offsets: Tensor
    full: bool


@dataclass(frozen=True)
class BucketedBatch:
    """A packed batch and its rows in buckets.

    Attributes:
        rows: `[B]`: the rows in the order of the buckets.
        back: `[B]`: the place of each row in that order.
    """

    packed: Batch
    rows: Tensor
    back: Tensor
    buckets: tuple[Bucket, ...]

    @property
    def label(self) -> Tensor:
        """`[B]`, in the order of the packed batch."""
        return self.packed.label


class ByLengthInterFormer(PaddedInterFormer):
    """`BucketedBatch -> logits [B]`, in the order of the packed batch.

    `both_sides(x, batch)` is the padded model between embeddings and head, which may be compiled in its place.
    """

    def __init__(self, config: InterFormerConfig, schema: Schema) -> None:
        super().__init__(config, schema, full=False)
        self.embedding.__class__ = _LookedUp
        self.both_sides = self._both_sides

    def forward(self, batch: BucketedBatch) -> Tensor:  # type: ignore[override]
        x, events = self.embedding.tokens(batch.packed), self.embedding.events(batch.packed)
        of_buckets = x.index_select(0, batch.rows).split([len(bucket.offsets) - 1 for bucket in batch.buckets])
        summaries = []
        for x_bucket, bucket in zip(of_buckets, batch.buckets, strict=True):
            self.full = bucket.full
            padded = events.index_select(0, bucket.places)
            of_bucket = replace(batch.packed, sequences=padded, offsets=bucket.offsets)
            summaries.append(self.both_sides(x_bucket, of_bucket))
        logits: Tensor = self.head(torch.cat(summaries).flatten(1)).squeeze(1)
        return logits.index_select(0, batch.back)


class _LookedUp(Embedding):
    """Events that were looked up before pass as they are."""

    def events(self, batch: Batch) -> Tensor:
        return batch.sequences if batch.sequences.is_floating_point() else super().events(batch)


def bucketed(batch: Batch, num_cls: int) -> BucketedBatch:
    """The batch with its rows in the buckets of `grouped`."""
    lengths = batch.offsets.diff()
    groups = [torch.tensor(group) for group in grouped(lengths.tolist(), num_cls)]
    rows = torch.cat(groups)
    buckets = []
    for group in groups:
        own, longest = lengths[group], max(int(lengths[group].max()), 1)
        places = batch.offsets[group, None] + torch.arange(longest)
        offsets = torch.cat((own.new_zeros(1), own.cumsum(0)))
        last = max(len(batch.sequences) - 1, 0)
        buckets.append(Bucket(places.flatten().clamp(max=last), offsets, bool((own == longest).all())))
    return BucketedBatch(batch, rows, rows.argsort(), tuple(buckets))


def grouped(lengths: Sequence[int], num_cls: int) -> list[list[int]]:
    """The rows in buckets, the shortest first; of all ways to cut the sorted rows the one of the least cost."""
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    ends = [i for i in range(1, len(rows) + 1) if i == len(rows) or lengths[rows[i]] > lengths[rows[i - 1]]]
    # The least cost of the first rows up to each end, and where its last bucket begins.
    least: dict[int, tuple[float, int]] = {0: (0.0, 0)}
    for end in ends:
        width = num_cls + lengths[rows[end - 1]]
        of_row = width * (1 + width / _ATTENTION)
        least[end] = min((cost + _CALL + (end - start) * of_row, start) for start, (cost, _) in least.items())
    groups, end = [], len(rows)
    while end:
        start = least[end][1]
        groups.append(rows[start:end])
        end = start
    return groups[::-1]
