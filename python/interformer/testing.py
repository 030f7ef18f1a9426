"""Small inputs, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from interformer.batch import Batch
from interformer.example import random_batch
from interformer.schema import Field, Schema

__all__ = ["random_batch", "rows_of", "small_schema"]


def small_schema(num_dense: int = 2) -> Schema:
    """Dense scalars, three categorical fields and three fields of an event; `item` and `category` are on both sides."""
    item, category = Field("item", "item"), Field("category", "category")
    return Schema(
        tables={"user": 11, "item": 23, "category": 5, "opinion": 2},
        dense=tuple(f"dense_{i}" for i in range(num_dense)),
        categorical=(Field("user", "user"), item, category),
        sequences=(item, category, Field("opinion", "opinion")),
        candidate=("item", "category"),
    )


def rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """A batch of the rows `rows` of a batch, in that order."""
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
