"""The choice whether attention's kernels rotate queries and keys, or a pass before does."""

from __future__ import annotations

from interformer_kernels._calls import AttentionCall

# A rotation inside the kernels costs a quarter of one in a pass before. So that pass pays for tokens that are loaded
# for more than four tiles of queries of 64, and as it is a launch, from so many rotations of a token under one head on.
_LOADS = 256
_ROTATIONS = 2**24


def rotated_before(call: AttentionCall, inside: bool, backward: bool) -> tuple[bool, bool]:
    """Whether queries, and whether keys, of a call with rotary tables are rotated in a pass before.

    Kernels rotate a tile whenever they load it: keys once for each tile of queries, and in the backward queries once
    for each tile of keys. Bits are the same either way. Where kernels cannot rotate, `inside` is false.
    """
    if call.layout != "packed" or call.v is None or call.skip_prefix:
        raise ValueError("attention: rope must be None without packed queries, without v, and with skip_prefix")
    if not inside:
        return True, True
    rows, (tokens, heads, _), (k_tokens, kv_heads, _) = call.kv_offsets.shape[0] - 1, call.q.shape, call.k.shape
    q_per_kv, rows = heads // kv_heads, max(1, rows)
    queries = backward and tokens * heads * (k_tokens // rows - _LOADS) > _ROTATIONS
    return queries, k_tokens * kv_heads * (tokens * q_per_kv // rows - _LOADS) > _ROTATIONS
