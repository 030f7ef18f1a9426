# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""How a program finds its row from the offsets, on the device.

Rows are cut into tiles of `BLOCK` packed rows, `PER_TOKEN` of them for a token (one for each head, say). Row `b` owns
the slots from `start_b * PER_TOKEN // BLOCK + b` on: at least as many as it has tiles, and at most one more, which
stays idle. So the number of slots follows from sizes alone, and a slot's row is found by a binary search over the
offsets themselves. The tokens behind the last row, the tail, are row `B`.

Rows whose keys are split have marks instead, the multiples of the split among all tokens. A row of more keys than a
split holds at least as many marks as it has splits behind its first one. So every row has a program by its number, and
every mark one more, which alone has to search.
"""

from __future__ import annotations

import triton
import triton.language as tl


def slots(tokens: int, rows: int, per_token: int, block: int) -> int:
    """Number of slots of `rows` rows and the tail, for any offsets."""
    return tokens * per_token // block + rows + 1


def marks(tokens: int, split_kv: int) -> int:
    """Number of multiples of a split among all tokens."""
    return -(-tokens // split_kv)


@triton.jit
def edge(offsets, i, tokens):
    """An entry of the offsets, clamped to the tokens of the tensor."""
    return tl.minimum(tl.maximum(tl.load(offsets + i).to(tl.int64), 0), tokens)


@triton.jit
def span(offsets, row, rows, tokens):
    """First token of a row (or of each of a tile of rows), and its number of tokens (int32); none behind the last."""
    first = edge(offsets, tl.minimum(row, rows), tokens)
    last = edge(offsets, tl.minimum(row + 1, rows), tokens)
    return first, tl.maximum(last - first, 0).to(tl.int32)


@triton.jit
def _search(goal, offsets, rows, tokens, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr):
    """Row of a slot or token, its first token, and the one behind its last.

    Every entry is clamped between the last one that led up and the last one that led down. So rows are a partition of
    all tokens whatever the offsets hold, the same one for every goal, and no token is left out.
    """
    low = rows * 0
    high = rows + low
    first = tl.zeros([], tl.int64)
    last = first + tokens
    while low < high:
        middle = (low + high + 1) // 2
        here = tl.minimum(tl.maximum(tl.load(offsets + middle).to(tl.int64), first), last)
        place = here * PER_TOKEN // BLOCK
        if SLOTS:
            place += middle
        goes_up = place <= goal
        first = tl.where(goes_up, here, first)
        last = tl.where(goes_up, last, here)
        low = tl.where(goes_up, middle, low)
        high = tl.where(goes_up, high, middle - 1)
    return low, first, last


@triton.jit
def find(slot, offsets, rows, tokens, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """Row of a slot, its first token and number of tokens, and the slot's tile, which may begin beyond the row."""
    row, first, last = _search(slot, offsets, rows, tokens, PER_TOKEN, BLOCK, True)
    return row, first, (last - first).to(tl.int32), slot - (first * PER_TOKEN // BLOCK + row).to(tl.int32)


@triton.jit
def holder(token, offsets, rows, tokens):
    """The row that holds a token (the tail is row `rows`), its first token, and its number of tokens."""
    row, first, last = _search(token, offsets, rows, tokens, 1, 1, False)
    return row, first, (last - first).to(tl.int32)


@triton.jit
def partition(row, offsets, rows, tokens):
    """First token of a row, or of the tail (row `rows`), and number of tokens, of the partition that searches find."""
    _, first, last = _search(row, offsets, rows, tokens, 0, 1, True)  # without tokens, a row is its own slot
    return first, (last - first).to(tl.int32)


@triton.jit
def split_row(mark, offsets, rows, tokens, skip, SPLIT_KV: tl.constexpr):
    """The row that holds a mark: its number, first token, keys behind the skipped ones, and whether these are split.

    A row is split if it has more than SPLIT_KV keys, and the search finds the tokens that the offsets name. Where
    offsets are in disorder, rows may overlap, but no two that are split. All programs of a row come to the same answer,
    since the search finds the same row at each of its marks.
    """
    row, first, count = holder(mark.to(tl.int64) * SPLIT_KV, offsets, rows, tokens)
    keys = count - skip
    is_split = (row < rows) & (keys > SPLIT_KV)
    if is_split:
        here, number = span(offsets, row, rows, tokens)
        is_split = (here == first) & (number == count)
    return row, first, keys, is_split
