"""The ops of the bench, in the order of its reports: those of docs/ops.md, and computations around them."""

from __future__ import annotations

from interformer_bench.ops import (
    apply_rotary,
    gated_cross_attention,
    jagged_attention,
    jagged_softmax,
    jagged_weighted_sum,
    personalized_ffn,
    pma_folded,
    pma_pooling,
)

_MODULES = (
    jagged_attention,
    pma_pooling,
    pma_folded,
    gated_cross_attention,
    apply_rotary,
    personalized_ffn,
    jagged_softmax,
    jagged_weighted_sum,
)
TABLE = {module.OP.name: module.OP for module in _MODULES}
