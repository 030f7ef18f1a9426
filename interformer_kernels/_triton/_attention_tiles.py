"""What the attention kernels share: tiles of queries and of keys, which of them meet, and their scores' maps.

A program takes `PACK` key/value heads of one row at once, `GROUP` query heads each. Its queries are numbered token by
token, the heads of a token side by side: query `r` is token `r // (PACK * GROUP)` under head `r % (PACK * GROUP)`. Keys
likewise: `c` is token `c // PACK` under key/value head `c % PACK`. A query sees keys of its own head; so one tile of
few queries under many heads is full, and the keys of all heads are read in one piece, as they lie in memory.

Three layouts of queries: "packed" `[Tq, H, D]` with offsets, "dense" `[B, N, H, D]`, "shared" `[M, H, D]`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._maps import LN_2, LOG2_E, activate, exp2, power, slope
from interformer_kernels._triton._rows import find, span


@triton.jit
def query_tile(slot, q_offsets, rows, tokens, queries, HEADS: tl.constexpr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr):
    """Row, first query token (as outputs are numbered), number of query tokens, and tile of a slot."""
    if LAYOUT == "packed":
        row, first, count, tile = find(slot, q_offsets, rows, tokens, HEADS, BLOCK)
    else:
        tiles = tl.cdiv(queries * HEADS, BLOCK)
        row = slot // tiles
        tile = slot % tiles
        first = row.to(tl.int64) * queries
        count = queries + row * 0
    return row, first, count, tile


@triton.jit
def queries_of(row, rows, tokens, q_offsets, queries, LAYOUT: tl.constexpr):
    """First query token of a row, as outputs are numbered, and how many the row has."""
    if LAYOUT == "packed":
        first, count = span(q_offsets, row, rows, tokens)
    else:
        first = row.to(tl.int64) * queries
        count = queries + row * 0
    return first, count


@triton.jit
def keys_of(row, rows, kv_offsets, tokens, skip):
    """First key token of a row behind the `skip` first ones, and how many the row has left; the tail has none."""
    first, count = span(kv_offsets, row, rows, tokens)
    return first + skip, tl.maximum(count - skip, 0)


@triton.jit
def is_short(offsets, row, rows, tokens, first, count, others, CELL: tl.constexpr):
    """Whether a row that was found is left to the kernels of short rows: it fits a CELL on both sides.

    `first`, `count`: its tokens on one side; `others`: how many it has on the other. Where offsets are in disorder, the
    search may have found other tokens than stand there; then it is not, so that none is left out.
    """
    here, number = span(offsets, row, rows, tokens)
    same = (here == first) & (number == count) & (row < rows)
    return same & (count <= CELL) & (others <= CELL)


@triton.jit
def task(
    slot, q_offsets, kv_offsets, rows, q_tokens, k_tokens, queries, skip,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr, SPLIT: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    """What a program of queries does: row, first query token, number of query tokens, tile of them; first key, number
    of keys, chunk of SPLIT keys; whether it is nothing.
    """
    chunk = slot * 0
    if SPLIT:
        tiles = tl.cdiv(queries * HEADS, BLOCK)
        tile = slot % tiles
        row, k_first, keys, chunk = find(slot // tiles, kv_offsets, rows, k_tokens, 1, SPLIT)
        k_first += skip
        keys = tl.maximum(keys - skip, 0)
        first, count = queries_of(row, rows, q_tokens, q_offsets, queries, LAYOUT)
        # Also a row without keys has a first chunk, which writes its outputs.
        idle = (row >= rows) | (chunk * SPLIT >= tl.maximum(keys, 1))
    else:
        row, first, count, tile = query_tile(slot, q_offsets, rows, q_tokens, queries, HEADS, BLOCK, LAYOUT)
        k_first, keys = keys_of(row, rows, kv_offsets, k_tokens, skip)
        idle = tile * BLOCK >= count * HEADS
        if CELL:
            idle = idle | is_short(q_offsets, row, rows, q_tokens, first, count, keys, CELL)
    return row, first, count, tile, k_first, keys, chunk, idle


@triton.jit
def at(row, first, n, row_stride, token_stride, LAYOUT: tl.constexpr):
    """Where the query tokens `n` of a row lie in a tensor of the queries' layout."""
    if LAYOUT == "packed":
        o = (first + n) * token_stride
    else:
        o = row.to(tl.int64) * row_stride + n.to(tl.int64) * token_stride
    return o


@triton.jit
def load_keys(
    k, v, i_pack, attempt, i_k, k_first, keys, k_token, k_head, v_token, v_head,
    D: tl.constexpr, DV: tl.constexpr, PACK: tl.constexpr, V_IS_K: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """A tile of keys: their tokens in the row and heads in the pack, keys and values; zero behind the row's last, and
    of heads that are not the attempt's."""
    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    j = (i_k * BLOCK_K + o_k) // PACK
    o_h = o_k % PACK
    m_k = j < of_attempt(keys, o_h, attempt, PACK)  # [BLOCK_K]
    head = (i_pack * PACK + o_h).to(tl.int64)
    p_k = (k_first + j) * k_token + head * k_head
    b_k = tl.load(k + p_k[:, None] + o_d, mask=m_k[:, None] & (o_d < D), other=0.0)
    if V_IS_K:
        b_v = b_k
    else:
        o_v = tl.arange(0, BLOCK_DV)
        p_v = (k_first + j) * v_token + head * v_head
        b_v = tl.load(v + p_v[:, None] + o_v, mask=m_k[:, None] & (o_v < DV), other=0.0)
    return j, o_h, b_k, b_v


@triton.jit
def key_tiles(
    n_first, n_last, queries, keys, left, right, prefix, TOKENS: tl.constexpr, CAUSAL: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Tiles of `TOKENS` keys that queries `n_first` to `n_last` see: `[0, before)` and `[start, stop)`."""
    shift = keys - queries
    begin = keys * 0
    end = keys
    if CAUSAL:
        end = tl.minimum(end, n_last + shift + 1)
    if RIGHT:
        end = tl.minimum(end, n_last + shift + right + 1)
    if LEFT:
        begin = tl.maximum(begin, n_first + shift - left)
    before = keys * 0
    if PREFIX:
        before = tl.cdiv(tl.minimum(prefix, keys), TOKENS)
        begin = tl.where(n_first < prefix, 0, begin)
        end = tl.where(n_first < prefix, keys, end)
    start = tl.maximum(begin // TOKENS, before)
    return before, start, tl.maximum(tl.cdiv(tl.maximum(end, 0), TOKENS), start)


@triton.jit
def query_tiles(
    j_first, j_last, queries, keys, left, right, prefix, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Tiles of `BLOCK` queries that see some of the keys `j_first` to `j_last`: `[0, before)` and `[start, stop)`."""
    shift = keys - queries
    begin = keys * 0
    end = queries
    if CAUSAL:
        begin = tl.maximum(begin, j_first - shift)
    if RIGHT:
        begin = tl.maximum(begin, j_first - shift - right)
    if LEFT:
        end = tl.minimum(end, j_last - shift + left + 1)
    before = keys * 0
    if PREFIX:
        before = tl.cdiv(tl.minimum(prefix, queries) * HEADS, BLOCK)
        begin = tl.where(j_first < prefix, 0, begin)
        end = tl.where(j_first < prefix, queries, end)
    start = tl.maximum(begin * HEADS // BLOCK, before)
    return before, start, tl.maximum(tl.cdiv(tl.maximum(end, 0) * HEADS, BLOCK), start)


@triton.jit
def visible(
    n, j, queries, keys, left, right, prefix, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PREFIX: tl.constexpr,
):  # fmt: skip
    """Whether query token `n` sees key `j`: two tiles that broadcast."""
    inside = (n < queries) & (j < keys)
    p = n + (keys - queries)
    seen = inside
    if CAUSAL:
        seen = seen & (j <= p)
    if RIGHT:
        seen = seen & (j <= p + right)
    if LEFT:
        seen = seen & (j >= p - left)
    if PREFIX:
        seen = seen | (inside & ((n < prefix) | (j < prefix)))
    return seen


@triton.jit
def sees_some(
    n, queries, keys, left, right, prefix, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PREFIX: tl.constexpr,
):  # fmt: skip
    """Whether query token `n` sees any key."""
    p = n + (keys - queries)
    begin = p * 0
    end = begin + keys
    if CAUSAL:
        end = tl.minimum(end, p + 1)
    if RIGHT:
        end = tl.minimum(end, p + right + 1)
    if LEFT:
        begin = tl.maximum(begin, p - left)
    some = begin < end
    if PREFIX:
        some = some | (begin < keys)
    return some & (n < queries)


@triton.jit
def scaled(grads, scale, DTYPE: tl.constexpr):
    """Gradients of scores as factors in the sums for dQ and dK: times `scale`, so that no sum overflows that `scale`
    would bring back. Small ones of float16 would lose digits so; `rest_of_scale` multiplies their sums.
    """
    if tl.float16 == DTYPE:
        inside = grads
    else:
        inside = grads * scale
    return inside


@triton.jit
def rest_of_scale(scale, keys, SCORE: tl.constexpr, DTYPE: tl.constexpr):
    """The factor of a row's sums over `scaled` gradients, where the row has so many keys."""
    factor = (keys * 0).to(tl.float32) + 1.0
    if tl.float16 == DTYPE:
        factor = factor * scale
    if SCORE == "softmax":
        # Nothing moves the softmax of one key, whatever `dP - delta` rounds to.
        factor = tl.where(keys == 1, 0.0, factor)
    return factor


@triton.jit
def weigh(s, grad, m_seen, lse, excess, delta, scale, SCORE: tl.constexpr, DTYPE: tl.constexpr):
    """Weights of the values but for `post_scale`, and gradients of the products `s` but for `rest_of_scale`, from the
    weights' gradients `grad`.

    `excess`: log2 of what the weights of a query by its log-sum-exp add up to; in float32 the caller divides by it.
    """
    if SCORE == "softmax":
        # lse = -inf: the query sees no key, or none but with scores of -inf, whose weights are NaN.
        x = (s * scale - lse) * LOG2_E
        if tl.float32 != DTYPE:
            x = x - excess
        weights = tl.where(m_seen, exp2(x, DTYPE), 0.0)
        # No value that is not finite goes through a mask.
        grads = tl.where(m_seen, scaled(weights * (grad - delta), scale, DTYPE), 0.0)
    else:
        x = s * scale
        weights = tl.where(m_seen, activate(x, SCORE, DTYPE), 0.0)
        grads = tl.where(m_seen, scaled(slope(x, SCORE, DTYPE) * grad, scale, DTYPE), 0.0)
        if SCORE == "relu":
            # Where the slope is 0, the gradient is, even if it overflowed.
            grads = tl.where(x <= 0, 0.0, grads)
    return weights, grads


@triton.jit
def spare_bits(keys):
    """`n` such that the weights of so many keys, of 1 at most each, add up to half of `2^n` at most."""
    return (tl.maximum(keys, 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 125


@triton.jit
def fold(s, m_seen, largest, total, keys, scale, post_scale, SCORE: tl.constexpr, DTYPE: tl.constexpr):
    """One more tile of products: its weights, the sums' factor, and the running largest score and total.

    Weights of a softmax are made smaller by a power of two, so that their sums over values stay within float32 where
    the values do. Float16 has no range for that in its operands, nor values that would need it.
    """
    if SCORE == "softmax":
        x = tl.where(m_seen, s * scale, float("-inf"))
        new = tl.maximum(largest, tl.max(x, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        if tl.float16 == DTYPE:
            weights = tl.exp2((x - base[:, None]) * LOG2_E)
        elif tl.bfloat16 == DTYPE:
            weights = tl.exp2((x - base[:, None]) * LOG2_E - spare_bits(keys).to(tl.float32))
        else:
            # Inside, it would round the exponent once more.
            weights = exp2((x - base[:, None]) * LOG2_E, DTYPE) * power(-spare_bits(keys))
        factor = exp2((largest - base) * LOG2_E, DTYPE)
        total = total * factor + tl.sum(weights, 1)
        largest = new
    else:
        weights = tl.where(m_seen, post_scale * activate(s * scale, SCORE, DTYPE), 0.0)
        factor = total * 0.0 + 1.0
    return weights, factor, largest, total


@triton.jit
def settle(sums, largest, total, keys, some, SCORE: tl.constexpr, DTYPE: tl.constexpr):
    """Attention outputs and the log-sum-exp, from the sums under the last scale; `some`: queries that see any key."""
    if SCORE == "softmax":
        # A sum over no key is zero, and stays so.
        total = tl.where(total == 0.0, 1.0, total)
        if tl.float32 == DTYPE:
            mean = tl.div_rn(sums, total[:, None])
            limit = 3.4028234663852886e38
        elif tl.bfloat16 == DTYPE:
            mean = sums / total[:, None]
            limit = 3.3895313892515355e38
        else:
            mean = sums / total[:, None]
            limit = 65504.0
        # A mean of finite values is none larger than them, whatever its rounding says.
        inside = tl.where(mean > limit, limit, tl.where(mean < -limit, -limit, mean))
        mean = tl.where(tl.abs(sums) < float("inf"), inside, mean)
        # As in PyTorch, the softmax of nothing but -inf is no number.
        sums = tl.where((some & (largest == float("-inf")))[:, None], float("nan"), mean)
        if tl.float16 != DTYPE:
            total = total * power(spare_bits(keys))
        lse = largest + tl.log2(total) * LN_2
    else:
        lse = largest
    return sums, lse


# ---------------------------------------------------------------- values that are not finite


@triton.jit
def of_attempt(count, cell, attempt, CELLS: tl.constexpr):
    """`count` for the lanes of the cell that an attempt is for, zero for others; the first attempt is for all cells.

    A tile of several cells (rows, or key/value heads) multiplies the numbers of each with zeros for the others, and
    zero times NaN or infinity is NaN. Where a result is not a number, a program goes on with attempts for each cell
    alone, as if the others were empty: so what is not finite stays in its cell, and bits of clean cells are the same.
    """
    if CELLS == 1:
        here = count
    else:
        here = tl.where(cell == tl.where(attempt == 0, cell, attempt - 1), count, 0)
    return here


@triton.jit
def not_numbers(x):
    """Of each row of a tile, whether it holds a NaN: 1 or 0."""
    return tl.max((x != x).to(tl.int32), 1)
