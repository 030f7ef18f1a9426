"""How the GPU backends cut long rows: many keys under few queries, or many tokens under one matrix.

A device then has work for all of its processors, and no long row is left to one of them.
"""

from __future__ import annotations

from interformer_kernels._calls import AttentionCall

SPLIT_KV = 1024  # keys of a split
# Tokens of a split where gradients of a row's matrix are summed: sums of more tokens would miss the error budget.
SPLIT_TOKENS = 512
_FEW_QUERIES = 32  # most queries of a row under one key/value head whose keys are split: more give work enough
_MAX_GROUPS = 512  # most row groups times key shards, over which gradients of shared queries are summed


def split_kv(call: AttentionCall) -> int:
    """Keys of the splits of longer rows; 0 where no row is split. Rows that fit one split keep their bits."""
    tokens, (heads, kv_heads) = call.k.shape[0], (call.q.shape[-2], call.k.shape[1])
    few = call.layout != "packed" and call.q.shape[-3] * (heads // kv_heads) <= _FEW_QUERIES
    return SPLIT_KV if few and tokens > SPLIT_KV else 0


def num_partials(tokens: int, split: int) -> int:
    """Most splits that rows of more than `split` tokens have together, wherever the rows of all `tokens` begin."""
    return 2 * tokens // split + 1


def row_groups(call: AttentionCall) -> tuple[int, int]:
    """Groups of equally many rows (the last may have fewer), and shards of a row's keys.

    Gradients of shared queries are sums over both.
    """
    rows = call.kv_offsets.shape[0] - 1
    groups = -(-rows // max(1, -(-rows // _MAX_GROUPS)))
    return groups, max(1, min(_MAX_GROUPS // max(1, groups), call.k.shape[0] // SPLIT_KV))
