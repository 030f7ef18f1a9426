# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Tiles of queries and of keys: where they are in a row and in memory, and which programs compute them.

A program takes `pack` key/value heads of one row at once, `q_per_kv` query heads each. Its packed rows are numbered
token by token, the heads of a token side by side: packed row `r` is token `r // (pack * q_per_kv)` under head
`r % (pack * q_per_kv)`. Keys likewise: `c` is token `c // pack` under key/value head `c % pack`. A query sees keys of
its own head. So one tile of few queries under many heads is full, and the keys of all heads are read in one piece, as
they lie in memory.

Three layouts of queries: "packed" `[Tq, H, D]` with offsets, "dense" `[B, N, H, D]`, "shared" `[M, H, D]`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._arguments import RowTask
from interformer_kernels._triton._attention_masks import targets_of
from interformer_kernels._triton._maps import narrow
from interformer_kernels._triton._rope import columns, rotate_k, rotate_q
from interformer_kernels._triton._rows import find, span, split_row
from interformer_kernels._triton._tile_list import listed_opposite, listed_tile


@triton.jit
def queries_of(row, offsets, sizes, LAYOUT: tl.constexpr):
    """First query token of a row, as outputs are numbered, and the row's number of queries."""
    if LAYOUT == "packed":
        first, count = span(offsets.q, row, sizes.rows, sizes.q_tokens)
    else:
        first = row.to(tl.int64) * sizes.queries
        count = sizes.queries + row * 0
    return first, count


@triton.jit
def keys_of(row, offsets, sizes):
    """First key token of a row behind the skipped ones, and how many the row has left; the tail has none."""
    first, count = span(offsets.kv, row, sizes.rows, sizes.k_tokens)
    return first + sizes.skip, tl.maximum(count - sizes.skip, 0)


@triton.jit
def is_short(offsets, row, rows, tokens, first, count, opposite, CELL: tl.constexpr):
    """Whether a row that was found is left to the kernels of short rows: it fits a CELL on both sides.

    `first`, `count`: its tokens on one side; `opposite`: their number on the other. Where offsets are in disorder, the
    search may have found other tokens than the offsets name; such a row is not left out, so no token is lost.
    """
    here, number = span(offsets, row, rows, tokens)
    same = (here == first) & (number == count) & (row < rows)
    return same & (count <= CELL) & (opposite <= CELL)


@triton.jit
def _tile_of(slot, sizes, SHAPE: tl.constexpr):
    """Row, group of rows or split of a slot, and its tile of queries. A division takes 30 instructions."""
    row = slot
    tile = slot * 0
    if not SHAPE.one_tile:
        tiles = tl.cdiv(sizes.queries * SHAPE.pack * SHAPE.q_per_kv, SHAPE.block_q)
        row = slot // tiles
        tile = slot % tiles
    return row, tile


@triton.jit
def _split_task(i, offsets, split_list, sizes, SPLIT_KV: tl.constexpr):
    """Row, first key, number of keys and split of a program by row or by mark (`_rows.py`), and whether it is idle.

    The row's own program has its first split, or, as split -1, all keys of a row that is not split. It searches only
    for a long row, to know what programs by mark will find. With a list, its entries (row, split) replace the marks.
    """
    row = i
    i_split = i * 0 - 1
    by_mark = i >= sizes.rows
    if split_list is not None:
        if by_mark:
            row = tl.load(split_list + 2 * (i - sizes.rows))
            i_split = tl.load(split_list + 2 * (i - sizes.rows) + 1)
        k_first, keys = keys_of(row, offsets, sizes)
        if keys > SPLIT_KV:
            i_split = tl.maximum(i_split, 0)
    else:
        # No keys by mark.
        k_first, keys = keys_of(row, offsets, sizes)
        if by_mark | (keys > SPLIT_KV):
            mark = tl.where(by_mark, i - sizes.rows, tl.cdiv(k_first - sizes.skip, SPLIT_KV)).to(tl.int32)
            found, first, found_keys, is_split = split_row(
                mark, offsets.kv, sizes.rows, sizes.k_tokens, sizes.skip, SPLIT_KV
            )
            split = mark - tl.cdiv(first, SPLIT_KV).to(tl.int32) + by_mark
            if is_split & (by_mark | (found == row)) & (split * SPLIT_KV < found_keys):
                row = found
                k_first = first + sizes.skip
                keys = found_keys
                i_split = split
    idle = by_mark & (i_split < 0)
    return row, k_first, keys, i_split, idle


@triton.jit
def query_task(
    slot, offsets, tile_list, sizes, variant, SHAPE: tl.constexpr, VARIANT: tl.constexpr, SPLIT_KV: tl.constexpr
):
    """The row of a program of queries, its tile of packed rows, its split of SPLIT_KV keys, and whether it is idle.

    A slot is found by a search, or read from the list of tiles, with SPLIT_KV of splits.
    """
    HEADS: tl.constexpr = SHAPE.pack * SHAPE.q_per_kv
    LAYOUT: tl.constexpr = SHAPE.layout
    i_split = slot * 0
    if SPLIT_KV:
        i, tile = _tile_of(slot, sizes, SHAPE)
        row, k_first, keys, i_split, idle = _split_task(i, offsets, tile_list, sizes, SPLIT_KV)
        first, count = queries_of(row, offsets, sizes, LAYOUT)
    elif tile_list is not None:
        row, tile, first, count = listed_tile(tile_list, slot)
        k_first, keys = listed_opposite(tile_list, slot)
        idle = slot >= tl.load(tile_list)
    else:
        if LAYOUT == "packed":
            row, first, count, tile = find(slot, offsets.q, sizes.rows, sizes.q_tokens, HEADS, SHAPE.block_q)
        else:
            row, tile = _tile_of(slot, sizes, SHAPE)
            first = row.to(tl.int64) * sizes.queries
            count = sizes.queries + row * 0
        k_first, keys = keys_of(row, offsets, sizes)
        idle = tile * SHAPE.block_q >= count * HEADS
        if SHAPE.cell:
            idle = idle | is_short(offsets.q, row, sizes.rows, sizes.q_tokens, first, count, keys, SHAPE.cell)
    targets = targets_of(row, sizes.rows, count, keys, variant, VARIANT)
    return RowTask(row, first, count, k_first, keys, targets), tile, i_split, idle


@triton.jit
def key_task(slot, offsets, tile_list, sizes, variant, SHAPE: tl.constexpr, VARIANT: tl.constexpr):
    """The row of a program of keys, whose skipped keys count here, its tile of keys, and whether it is idle."""
    LAYOUT: tl.constexpr = SHAPE.layout
    if tile_list is not None:
        row, tile, k_first, tokens = listed_tile(tile_list, slot)
        if SHAPE.layout == "packed":
            first, count = listed_opposite(tile_list, slot)
        else:
            first, count = queries_of(row, offsets, sizes, LAYOUT)
        idle = slot >= tl.load(tile_list)
    else:
        row, k_first, tokens, tile = find(slot, offsets.kv, sizes.rows, sizes.k_tokens, SHAPE.pack, SHAPE.block_k)
        first, count = queries_of(row, offsets, sizes, LAYOUT)
        idle = tile * SHAPE.block_k >= tokens * SHAPE.pack
        if SHAPE.cell:
            idle = idle | is_short(offsets.kv, row, sizes.rows, sizes.k_tokens, k_first, tokens, count, SHAPE.cell)
    targets = targets_of(row, sizes.rows, count, tokens, variant, VARIANT)
    return RowTask(row, first, count, k_first, tokens, targets), tile, idle


@triton.jit
def tiles_of_program(i, tile_list, SHAPE: tl.constexpr, PERSISTENT: tl.constexpr):
    """End and stride of a program's steps from its own tile on: that tile alone, or all of the list that are left."""
    if PERSISTENT:
        end = tl.load(tile_list) * SHAPE.packs - i
        stride = tl.num_programs(0)
    else:
        end = 1
        stride = 1
    return end, stride


@triton.jit
def packed_rows(tile, i_pack, SHAPE: tl.constexpr):
    """Query token, head of the pack, and head of the call, of each packed row of a tile."""
    HEADS: tl.constexpr = SHAPE.pack * SHAPE.q_per_kv
    o_q = tile * SHAPE.block_q + tl.arange(0, SHAPE.block_q)
    cell = o_q % HEADS // SHAPE.q_per_kv
    return o_q // HEADS, cell, (i_pack * HEADS + o_q % HEADS).to(tl.int64)


@triton.jit
def tokens_of_tile(tile, count, SHAPE: tl.constexpr):
    """First and last query token of a tile of packed rows."""
    HEADS: tl.constexpr = SHAPE.pack * SHAPE.q_per_kv
    last = (tile * SHAPE.block_q + SHAPE.block_q - 1) // HEADS
    return tile * SHAPE.block_q // HEADS, tl.minimum(last, count - 1)


@triton.jit
def places(x, row, first, n, head, LAYOUT: tl.constexpr):
    """Places in memory of the query tokens `n` of a row under `head`, in an operand of the queries' layout."""
    if LAYOUT == "packed":
        p = (first + n) * x.token
    else:
        p = row.to(tl.int64) * x.row + n.to(tl.int64) * x.token
    return p + head * x.head


@triton.jit
def load_queries(x, row, first, n, head, mask, C: tl.constexpr, BLOCK_C: tl.constexpr, LAYOUT: tl.constexpr):
    """The channels `[BLOCK_Q, BLOCK_C]` of packed rows; zero where the mask says no."""
    o_c = tl.arange(0, BLOCK_C)
    p = places(x, row, first, n, head, LAYOUT)
    return tl.load(x.pointer + p[:, None] + o_c, mask=mask[:, None] & (o_c < C), other=0.0)


@triton.jit
def load_tokens(x, first, i, head, mask, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels `[BLOCK, BLOCK_C]` of tokens `i` of the row whose first is `first`; zero where the mask says no."""
    o_c = tl.arange(0, BLOCK_C)
    p = (first + i) * x.token + head * x.head
    return tl.load(x.pointer + p[:, None] + o_c, mask=mask[:, None] & (o_c < C)[None, :], other=0.0)


@triton.jit
def load_numbers(x, p, mask):
    """Float32 numbers at places of `x`; zeros where the mask says no, and where `x` is None."""
    numbers = (p * 0).to(tl.float32)
    if x is not None:
        numbers = tl.load(x + p, mask=mask, other=0.0)
    return numbers


@triton.jit
def store_tokens(to, p_token, mask, values, o_c, C: tl.constexpr):
    """Store the channels `o_c` of tokens at the places `p_token` of a contiguous tensor."""
    p = p_token[:, None] * C + o_c
    tl.store(to + p, narrow(values, to.dtype.element_ty), mask=mask[:, None] & (o_c < C)[None, :])


@triton.jit
def _load_tile(x, first, i_t, TOKENS: tl.constexpr, t, head, mask, o_c, C: tl.constexpr):
    """The channels `o_c` of tokens `i_t * TOKENS + t` of the row whose first is `first`; zero where the mask says no.

    Only `i_t`, which is never negative where anything is loaded, differs from step to step. Its product with the stride
    is a few instructions as one unsigned number, and is added to the pointer: all other sums stay outside of the loop.
    """
    BLOCK_C: tl.constexpr = o_c.shape[0]
    m = mask[:, None]
    if C < BLOCK_C:
        m = m & (o_c < C)
    tile = x.pointer + i_t.to(tl.uint32).to(tl.int64) * x.token * TOKENS
    p = (first + t) * x.token + head * x.head
    return tl.load(tile + (p[:, None] + o_c), mask=m, other=0.0)


@triton.jit
def load_q(q, rope, row, first, n, head, mask, SHAPE: tl.constexpr):
    """The queries `[BLOCK_Q, BLOCK_D]` of packed rows, rotated, by `_rope.columns`; zero where the mask says no."""
    LAYOUT: tl.constexpr = SHAPE.layout
    o_d = columns(SHAPE.block_d, SHAPE.half, SHAPE.interleaved)
    p = places(q, row, first, n, head, LAYOUT)
    b_q = tl.load(q.pointer + p[:, None] + o_d, mask=mask[:, None] & (o_d < SHAPE.d), other=0.0)
    return rotate_q(b_q, rope, first, n, mask, SHAPE, False)


@triton.jit
def load_k(k, rope, first, j, head, mask, SHAPE: tl.constexpr):
    """The keys `[BLOCK_K, BLOCK_D]` of a row's tokens, rotated, by `_rope.columns`; zero where the mask says no."""
    o_d = columns(SHAPE.block_d, SHAPE.half, SHAPE.interleaved)
    p = (first + j) * k.token + head * k.head
    b_k = tl.load(k.pointer + p[:, None] + o_d, mask=mask[:, None] & (o_d < SHAPE.d), other=0.0)
    return rotate_k(b_k, rope, first, j, mask, SHAPE, False)


@triton.jit
def load_keys(kv, i_pack, attempt, i_k, task, SHAPE: tl.constexpr):
    """A tile of keys: their tokens in the row and heads in the pack, keys and values; zero behind the row's last, and
    of heads that are not the attempt's."""
    TOKENS: tl.constexpr = SHAPE.block_k // SHAPE.pack
    o_k = tl.arange(0, SHAPE.block_k)
    t = o_k // SHAPE.pack
    o_h = o_k % SHAPE.pack
    m_k = i_k * TOKENS < of_attempt(task.keys, o_h, attempt, SHAPE.pack) - t  # [BLOCK_K]
    head = (i_pack * SHAPE.pack + o_h).to(tl.int64)
    o_d = columns(SHAPE.block_d, SHAPE.half, SHAPE.interleaved)
    b_k = _load_tile(kv.k, task.k_first, i_k, TOKENS, t, head, m_k, o_d, SHAPE.d)
    j = i_k * TOKENS + t
    b_k = rotate_k(b_k, kv.rope, task.k_first, j, m_k, SHAPE, False)
    if SHAPE.v_is_k:
        b_v = b_k
    else:
        o_v = tl.arange(0, SHAPE.block_dv)
        b_v = _load_tile(kv.v, task.k_first, i_k, TOKENS, t, head, m_k, o_v, SHAPE.dv)
    return j, o_h, b_k, b_v


@triton.jit
def load_key_tile(kv, k_first, t, head, m_in, SHAPE: tl.constexpr):
    """The keys and values of a tile; zero where the mask says no."""
    b_k = load_k(kv.k, kv.rope, k_first, t, head, m_in, SHAPE)
    if SHAPE.v_is_k:
        b_v = b_k
    else:
        b_v = load_tokens(kv.v, k_first, t, head, m_in, SHAPE.dv, SHAPE.block_dv)
    return b_k, b_v


# ---------------------------------------------------------------- values that are not finite


@triton.jit
def of_attempt(count, cell, attempt, CELLS: tl.constexpr):
    """`count` for the lanes of the cell that an attempt is for, zero for others; the first attempt is for all cells.

    A tile of several cells (rows, or key/value heads) multiplies the numbers of each with zeros for the others, and
    zero times NaN or infinity is NaN. Where a result is not a number, a program goes on with attempts for each cell
    alone, as if the others were empty. So a number that is not finite stays in its cell, and clean cells keep their
    bits.
    """
    if CELLS == 1:
        here = count
    else:
        here = tl.where(cell == tl.where(attempt == 0, cell, attempt - 1), count, 0)
    return here


@triton.jit
def rows_with_nan(x):
    """1 for each row of a tile that holds a NaN, else 0."""
    return tl.max((x != x).to(tl.int32), 1)
