# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Lists of the live tiles of a batch, so that the programs of thousands of rows need not search for their rows.

The search of `_rows.py` costs as much as the work of a short row, and most of its slots are idle where most rows are
short. `list_tiles` writes an entry for each tile that has work: its row, its tile in the row, and the row's first token
and number of tokens on both sides. A program reads one entry, and nothing of the offsets.

Whatever the offsets hold, the listed rows are a partition of all tokens, and lists of both sides know the same ones: a
row begins at the largest offset up to its own. Where they are in order, these are the rows that the search finds. What
an entry says was clamped to the tensors when it was written, so an entry never leads out of bounds.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROWS = 4096  # of a program of `list_tiles`, and entries that it writes at once
WARPS = 8
# The first entry's place holds the number of the others.
ENTRY = tl.constexpr(6)


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b)


@triton.jit
def _edges(offsets, row, rows, tokens):
    """First token of each of a tile of rows, and the one behind its last, in 32 bits; none behind the tail."""
    first = tl.load(offsets + row, mask=row <= rows, other=tokens)
    last = tl.load(offsets + row + 1, mask=row < rows, other=tokens)
    first = tl.minimum(tl.maximum(first, 0), tokens).to(tl.int32)
    return first, tl.minimum(tl.maximum(last, 0), tokens).to(tl.int32)


@triton.jit
def _rows_of(offsets, row, top, rows, tokens):
    """First token and number of tokens of each of a tile of rows, and whether its offsets are in order; `top`: the
    largest offset before them."""
    here, last = _edges(offsets, row, rows, tokens)
    # The first row has the tokens before it, too, as the search would have it.
    first = tl.where(row > 0, here, 0)
    if tl.max(((last < first) | (first < top)).to(tl.int32), 0) > 0:
        first = tl.maximum(tl.associative_scan(first, 0, _largest), top)
    count = tl.maximum(last, first) - first
    return first, count, (first == here) & (count == last - here)


@triton.jit
def _rows_from(begin, tops, offsets, opposite, rows, tokens, opposite_tokens, CELL: tl.constexpr, N: tl.constexpr):
    """First token, number of tokens, and both of the other side, for `N` rows from `begin` on (the tail is row `rows`,
    and has those behind it as empty ones); no tokens of short rows. `tops`: the largest offsets before them.
    """
    row = begin + tl.arange(0, N)
    first, count, in_order = _rows_of(offsets, row, tops[0], rows, tokens)
    other_first = first
    other_count = count
    if opposite is not None:
        other_first, other_count, other_in_order = _rows_of(opposite, row, tops[1], rows, opposite_tokens)
        in_order = in_order & other_in_order
    other_count = tl.where(row < rows, other_count, 0)
    if CELL > 0:
        # A row in disorder is never short: the kernels of short rows may know it by other tokens.
        short = in_order & (row < rows) & (count <= CELL) & (other_count <= CELL)
        count = tl.where(short, 0, count)
    return first, count, other_first, other_count


@triton.jit(do_not_specialize=["rows", "tokens", "opposite_tokens"])
def list_tiles(
    offsets, opposite, entries, rows, tokens, opposite_tokens,
    PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, CELL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """List the tiles of ROWS rows, behind those of all rows before, and in the last program the number of all.

    Tiles have BLOCK packed rows, PER_TOKEN of them for a token. Without offsets of the `opposite` side, rows have the
    same tokens on both sides, or as many as all others there, which then need no entries. Rows of at most CELL tokens
    on both sides are left out.
    """
    begin = tl.program_id(0) * ROWS
    tops = (begin * 0, begin * 0)
    before = begin * 0
    for start in range(0, begin, ROWS):
        first, count, other_first, _ = _rows_from(
            start, tops, offsets, opposite, rows, tokens, opposite_tokens, CELL, ROWS
        )
        before += tl.sum(tl.cdiv(count * PER_TOKEN, BLOCK), 0)
        tops = (tl.max(first, 0), tl.max(other_first, 0))
    first, count, other_first, other_count = _rows_from(
        begin, tops, offsets, opposite, rows, tokens, opposite_tokens, CELL, ROWS
    )
    ends = tl.cumsum(tl.cdiv(count * PER_TOKEN, BLOCK), 0)
    number = tl.max(ends, 0)
    if begin + ROWS > rows:
        tl.store(entries, before + number)
    for start in range(0, number, ROWS):
        i = start + tl.arange(0, ROWS)
        # The row of each entry is the first one whose tiles end behind it.
        low = i * 0
        half = begin * 0 + ROWS // 2
        while half > 0:
            low = tl.where(tl.gather(ends, low + half - 1, 0) <= i, low + half, low)
            half = half // 2
        tiles_before = tl.where(low > 0, tl.gather(ends, tl.maximum(low - 1, 0), 0), 0)
        p_entry = entries + (before + i + 1).to(tl.int64) * ENTRY
        m = i < number
        tl.store(p_entry, begin + low, mask=m)
        tl.store(p_entry + 1, i - tiles_before, mask=m)
        tl.store(p_entry + 2, tl.gather(first, low, 0), mask=m)
        tl.store(p_entry + 3, tl.gather(count, low, 0), mask=m)
        tl.store(p_entry + 4, tl.gather(other_first, low, 0), mask=m)
        tl.store(p_entry + 5, tl.gather(other_count, low, 0), mask=m)


@triton.jit
def _number(entries, i, FIELD: tl.constexpr):
    """A number of an entry. None is negative, but the compiler needs to be told: it takes fewer instructions then."""
    return tl.maximum(tl.load(entries + (i + 1).to(tl.int64) * ENTRY + FIELD), 0)


@triton.jit
def listed_tile(entries, i):
    """Row, tile, first token and number of tokens of an entry."""
    first = _number(entries, i, 2).to(tl.int64)
    return _number(entries, i, 0), _number(entries, i, 1), first, _number(entries, i, 3)


@triton.jit
def listed_opposite(entries, i):
    """First token and number of tokens of the row of an entry, on the other side."""
    return _number(entries, i, 4).to(tl.int64), _number(entries, i, 5)
