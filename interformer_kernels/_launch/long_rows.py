"""How rows of many keys under few queries, or of many tokens under one matrix, are cut up. Knows no backend.

So there is work for a whole device, and no long row holds it up.
"""

from __future__ import annotations

from interformer_kernels._calls import AttentionCall

SPLIT = 1024  # keys of a chunk
TOKENS = 512  # of a chunk where gradients of a row's matrix are summed: more would be beyond the budget of rounding
_FEW = 32  # queries of a row under one key/value head, at most, for that: more make work enough
_MOST_RUNS = 512  # of rows, over which gradients of shared queries are summed, times parts of their keys


def split(call: AttentionCall) -> int:
    """Keys of the chunks that longer rows are cut into; 0 where none is. Rows that fit one chunk do not notice."""
    tokens, (heads, kv_heads) = call.k.shape[0], (call.q.shape[-2], call.k.shape[1])
    few = call.layout != "packed" and call.q.shape[-3] * (heads // kv_heads) <= _FEW
    return SPLIT if few and tokens > SPLIT else 0


def pieces(tokens: int, split: int) -> int:
    """Room for the chunks of all rows of more than `split` of so many tokens, wherever rows begin."""
    return 2 * tokens // split + 1


def runs(call: AttentionCall) -> tuple[int, int]:
    """Runs of equally many rows (the last may have fewer), and parts of a row's keys.

    Gradients of shared queries are sums over both.
    """
    rows = call.kv_offsets.shape[0] - 1
    count = -(-rows // max(1, -(-rows // _MOST_RUNS)))
    return count, max(1, min(_MOST_RUNS // max(1, count), call.k.shape[0] // SPLIT))
