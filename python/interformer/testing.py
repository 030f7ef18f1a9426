"""Makers of small inputs, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from interformer.batch import Batch
from interformer.schema import Field, Schema


def small_schema(num_dense: int = 2) -> Schema:
    """Dense scalars, three categorical fields and three of an event; `item` and `category` are on both sides."""
    item, category = Field("item", "item"), Field("category", "category")
    return Schema(
        tables={"user": 11, "item": 23, "category": 5, "opinion": 2},
        dense=tuple(f"dense_{i}" for i in range(num_dense)),
        categorical=(Field("user", "user"), item, category),
        sequences=(item, category, Field("opinion", "opinion")),
        candidate=("item", "category"),
    )


def random_batch(schema: Schema, lengths: Sequence[int], seed: int = 0, tail: int = 0) -> Batch:
    """A batch whose row `b` has `lengths[b]` events, with random ids and labels, and `tail` events of no row."""
    g = torch.Generator().manual_seed(seed)
    rows = len(lengths)

    def ids(fields: tuple[Field, ...], count: int) -> Tensor:
        columns = [torch.randint(schema.tables[field.table], (count,), generator=g) for field in fields]
        return torch.stack(columns, 1) if columns else torch.empty(count, 0, dtype=torch.int64)

    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Batch(
        dense=torch.randn(rows, len(schema.dense), generator=g),
        categorical=ids(schema.categorical, rows),
        sequences=ids(schema.sequences, sum(lengths) + tail),
        offsets=offsets,
        label=torch.randint(2, (rows,), generator=g).float(),
        user=torch.randint(5, (rows,), generator=g),
    )


def rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """The rows `rows` of a batch as a batch of their own, in that order."""
    spans = [slice(int(batch.offsets[b]), int(batch.offsets[b + 1])) for b in rows]
    index = torch.tensor(rows)
    return Batch(
        dense=batch.dense[index],
        categorical=batch.categorical[index],
        sequences=torch.cat([batch.sequences[span] for span in spans]),
        offsets=torch.tensor([0, *(span.stop - span.start for span in spans)]).cumsum(0),
        label=batch.label[index],
        user=batch.user[index],
    )
