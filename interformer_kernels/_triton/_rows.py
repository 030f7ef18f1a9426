"""How a program finds its row from the offsets, on the device.

Rows are cut into tiles of `BLOCK` units, a token being `UNITS` of them (its heads, say). Row `b` owns the slots from
`start_b * UNITS // BLOCK + b` on: at least as many as it has tiles, and at most one more, which stays idle. So the
number of slots follows from sizes alone, and a slot's row is found by a binary search over the offsets themselves. The
tokens behind the last row, the tail, are row `B`.
"""

from __future__ import annotations

import triton
import triton.language as tl


def slots(tokens: int, rows: int, units: int, block: int) -> int:
    """Number of slots of `rows` rows and the tail, for any offsets."""
    return tokens * units // block + rows + 1


@triton.jit
def edge(offsets, i, tokens):
    """An entry of the offsets, within the tensor whatever it holds."""
    return tl.minimum(tl.maximum(tl.load(offsets + i).to(tl.int64), 0), tokens)


@triton.jit
def span(offsets, row, rows, tokens):
    """First token of a row, and its number of tokens (int32); the tail reaches to the end."""
    first = edge(offsets, row, tokens)
    last = tokens + first * 0
    if row < rows:
        last = edge(offsets, row + 1, tokens)
    return first, tl.maximum(last - first, 0).to(tl.int32)


@triton.jit
def find(slot, offsets, rows, tokens, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """Row, first token, number of tokens, and tile (one that begins at a token of the row, or beyond) of a slot."""
    low = slot * 0
    high = slot * 0 + rows
    while low < high:
        middle = (low + high + 1) // 2
        here = edge(offsets, middle, tokens) * UNITS // BLOCK + middle <= slot
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle - 1)
    first, count = span(offsets, low, rows, tokens)
    tile = slot - (first * UNITS // BLOCK + low).to(tl.int32)
    # Before the first slot of a first row that starts late, against the contract, there is no row.
    return low, first, tl.where(tile < 0, 0, count), tl.maximum(tile, 0)


@triton.jit
def holder(token, offsets, rows, tokens):
    """The row that holds a token (the tail is row `rows`), and its first token."""
    low = rows * 0
    high = rows + low
    while low < high:
        middle = (low + high + 1) // 2
        here = edge(offsets, middle, tokens) <= token
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle - 1)
    return low, edge(offsets, low, tokens)
