"""One call of one op under test, and lengths of rows that every op must get right."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

NO_ROWS: tuple[int, ...] = ()
ALL_EMPTY = (0, 0, 0)
MIXED = (5, 0, 37, 1, 8)
TILE_EDGES = (63, 0, 64, 65, 1)
ONE_GIANT = (1, 2, 300, 0, 3)
MANY_ROWS = 24 * (5, 40)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one op: row lengths, sizes, and which of the op's options it uses.

    Attributes:
        lengths: tokens of each row (of the keys, where queries have their own).
        query_lengths: queries of each row; for `gated_cross_attention`, None means dense queries.
        kv_rows: the row of keys of each row of queries (gated_cross_attention); `query_lengths` then has as many.
        queries: seeds `M`, or dense queries `N` of a row.
        tail: tokens behind the last row; their inputs hold NaN.
        gate: `""` (none), or its shape: `"full"`, `"head"` `[..., H, 1]`, `"token"` `[..., 1, 1]`, `"channel"`
            `[H, Dv]`, `"heads"` `[H, 1]`, `"scalar"`.
        rope: channels that rotate; 0 is no rotary embedding.
        positions: explicit rotary positions instead of the index in the row.
        shared_value: `v=None`, the keys are the values (pma_pooling).
        targets: targets of each row (jagged_attention).
        sinks: with sinks.
        position_bias: `P` of a position bias `[H, 2 P + 1]`, or of one for all heads where it is negative.
        time_bias: bins of a time bias, with times and edges.
        grad_lse: the log-sum-exp has a gradient, too (softmax).
        bias: with a bias (personalized_ffn).
        strided: tensors are slices of wider ones, so that only their last axis is contiguous.
        options: further keyword arguments of the public function.
    """

    op: str
    name: str
    lengths: tuple[int, ...] = MIXED
    query_lengths: tuple[int, ...] | None = None
    kv_rows: tuple[int, ...] | None = None
    queries: int = 3
    heads: int = 4
    kv_heads: int = 4
    head_size: int = 16
    value_size: int = 16
    tail: int = 3
    gate: str = ""
    residual: bool = False
    rope: int = 0
    positions: bool = False
    strided: bool = False
    shared_value: bool = False
    targets: tuple[int, ...] | None = None
    sinks: bool = False
    position_bias: int = 0
    time_bias: int = 0
    grad_lse: bool = False
    bias: bool = True
    index_dtype: torch.dtype = torch.int64
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


# Hard cases have rows that share a tile of short rows, one beyond it, and an empty one; heads in groups, and packed
# where they may be.
HARD_LENGTHS = (3, 0, 9, 1, 37)
HARD_SIZES: dict[str, Any] = {"lengths": HARD_LENGTHS, "heads": 4, "kv_heads": 2, "head_size": 8, "value_size": 6}
