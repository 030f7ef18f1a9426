"""Random batches of a schema: example inputs for `export`, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from interformer.batch import Batch
from interformer.schema import Field, Schema


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
