"""How the GPU backends cut long rows: many keys under few queries, or many tokens under one matrix.

A device then has work for all of its processors, and no long row is left to one of them.
"""

from __future__ import annotations

from interformer_kernels._calls import AttentionCall

# Keys of a split, by the queries of a row under one key/value head. A partial of 32-bit sums is written and read once
# more, so splits of so many keys for each query add 1/16 to the bytes of 16-bit keys and values. Splits of the fewest
# keys give 16 rows of 4096 keys nearly four waves of programs on the 132 processors of an H200.
_KEYS_PER_QUERY = 32
_MIN_SPLIT_KV = 128
SPLIT_KV = 1024  # keys of a split at most
# Tokens of a split where gradients of a row's matrix are summed: sums of more tokens would miss the error budget.
SPLIT_TOKENS = 512
_FEW_QUERIES = 32  # most queries of a row under one key/value head whose keys are split: more give work enough
# Gradients of shared queries are summed over groups of rows and shards of their keys, by so many programs at most, of
# `_QUERIES_OF_SUM` queries each: fewer would have long chains of rows, more would write more sums than they read keys.
_MAX_SUMS = 2048
_QUERIES_OF_SUM = 64
_KEYS_OF_SHARD = 1024  # keys of all rows for each shard at least


def split_kv(call: AttentionCall) -> int:
    """Keys of the splits of longer rows; 0 where no row is split. Rows that fit one split keep their bits.

    A power of two. It follows from the shapes of a row, not from the batch, so bits do not depend on other rows.
    """
    if call.layout == "packed":
        return 0
    tokens, (heads, kv_heads) = call.k.shape[0], (call.q.shape[-2], call.k.shape[1])
    queries = call.q.shape[-3] * (heads // kv_heads)
    split = min(SPLIT_KV, max(_MIN_SPLIT_KV, _KEYS_PER_QUERY << (queries - 1).bit_length()))
    return split if queries <= _FEW_QUERIES and tokens > split else 0


def num_partials(tokens: int, split: int) -> int:
    """Most splits that rows of more than `split` tokens have together, wherever the rows of all `tokens` begin."""
    return 2 * tokens // split + 1


def row_groups(call: AttentionCall) -> tuple[int, int]:
    """Groups of equally many rows (the last may have fewer), and shards of a row's keys.

    Gradients of shared queries are sums over both.
    """
    rows = call.kv_offsets.shape[0] - 1
    most = max(1, _MAX_SUMS // max(1, -(-call.q.shape[0] * call.q.shape[1] // _QUERIES_OF_SUM)))
    groups = -(-rows // max(1, -(-rows // most)))
    return groups, max(1, min(most // max(1, groups), call.k.shape[0] // _KEYS_OF_SHARD))
