# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""The masks of attention: which queries of a row see which of its keys, tile by tile and pair by pair.

Most tiles of long rows have no edge: all of their pairs are seen, and kernels compare nothing. `variant` and `VARIANT`
are those of `_attention_variant.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Pairs(NamedTuple):
    """A tile of pairs of a query and a key, one for each score: the query's token in the row and its head, the key's
    token in the row, and the row's numbers of queries and keys, all of which broadcast to the tile. Tiles of the
    backward of keys have keys as rows.

    `edge`: whether some pairs may be masked out; `cells`: a mask of the pairs that are in one cell, or None.
    """

    n: Any
    j: Any
    head: Any
    queries: Any
    keys: Any
    edge: Any
    cells: Any


@triton.jit
def key_tiles(n_first, n_last, queries, keys, variant, TOKENS: tl.constexpr, VARIANT: tl.constexpr):
    """Tiles of `TOKENS` keys that queries `n_first` to `n_last` see: `[0, before)` and `[start, stop)`."""
    shift = keys - queries
    begin = keys * 0
    end = keys
    if VARIANT.causal:
        end = tl.minimum(end, n_last + shift + 1)
    if VARIANT.right:
        end = tl.minimum(end, n_last + shift + variant.right + 1)
    if VARIANT.left:
        begin = tl.maximum(begin, n_first + shift - variant.left)
    before = keys * 0
    if VARIANT.prefix:
        before = tl.cdiv(tl.minimum(variant.prefix, keys), TOKENS)
        begin = tl.where(n_first < variant.prefix, 0, begin)
        end = tl.where(n_first < variant.prefix, keys, end)
    start = tl.maximum(begin // TOKENS, before)
    return before, start, tl.maximum(tl.cdiv(tl.maximum(end, 0), TOKENS), start)


@triton.jit
def query_tiles(
    j_first, j_last, queries, keys, variant, HEADS: tl.constexpr, BLOCK: tl.constexpr, VARIANT: tl.constexpr
):
    """Tiles of `BLOCK` packed rows that see some of the keys `j_first` to `j_last`: `[0, before)`, `[start, stop)`."""
    shift = keys - queries
    begin = keys * 0
    end = queries
    if VARIANT.causal:
        begin = tl.maximum(begin, j_first - shift)
    if VARIANT.right:
        begin = tl.maximum(begin, j_first - shift - variant.right)
    if VARIANT.left:
        end = tl.minimum(end, j_last - shift + variant.left + 1)
    before = keys * 0
    if VARIANT.prefix:
        before = tl.cdiv(tl.minimum(variant.prefix, queries) * HEADS, BLOCK)
        begin = tl.where(j_first < variant.prefix, 0, begin)
        end = tl.where(j_first < variant.prefix, queries, end)
    start = tl.maximum(begin * HEADS // BLOCK, before)
    return before, start, tl.maximum(tl.cdiv(tl.maximum(end, 0) * HEADS, BLOCK), start)


@triton.jit
def _key_range(n, queries, keys, variant, VARIANT: tl.constexpr):
    """The keys `[begin, end)` that query token `n` sees besides those of the prefix.

    Tiles compare keys with these bounds: a mask costs one comparison a side, however many options make it.
    """
    p = n + (keys - queries)
    begin = p * 0
    end = begin + keys
    if VARIANT.causal:
        end = tl.minimum(end, p + 1)
    if VARIANT.right:
        end = tl.minimum(end, p + variant.right + 1)
    if VARIANT.left:
        begin = tl.maximum(begin, p - variant.left)
    if VARIANT.prefix:
        begin = tl.where(n < variant.prefix, 0, begin)
        end = tl.where(n < variant.prefix, keys, end)
    return begin, end


@triton.jit
def has_edge(n_first, n_last, j_first, j_last, queries, keys, variant, VARIANT: tl.constexpr):
    """Whether masks may keep some of the queries `n_first` to `n_last` from some of the keys `j_first` to `j_last`."""
    shift = keys - queries
    edge = keys < 0
    if VARIANT.causal:
        edge = edge | (j_last > n_first + shift)
    if VARIANT.right:
        edge = edge | (j_last > n_first + shift + variant.right)
    if VARIANT.left:
        edge = edge | (j_first < n_last + shift - variant.left)
    return edge


@triton.jit
def tile_has_edge(i_k, tokens, task, variant, TOKENS: tl.constexpr, VARIANT: tl.constexpr):
    """`has_edge` of the query tokens from the first to the last and of a tile of keys, which may end behind the row."""
    n_first, n_last = tokens
    j_last = i_k * TOKENS + TOKENS - 1
    edge = has_edge(n_first, n_last, i_k * TOKENS, j_last, task.count, task.keys, variant, VARIANT)
    return edge | (j_last >= task.keys)


@triton.jit
def seen_pairs(pairs, variant, VARIANT: tl.constexpr):
    """Which queries see which keys. Queries behind the row's last see some, too: their numbers are zeros, and their
    results are not stored."""
    if VARIANT.causal or VARIANT.right or VARIANT.left:
        begin, end = _key_range(pairs.n, pairs.queries, pairs.keys, variant, VARIANT)
        seen = pairs.j < end
        if VARIANT.left:
            seen = seen & (pairs.j >= begin)
        if VARIANT.prefix:
            seen = seen | (pairs.j < tl.minimum(variant.prefix, pairs.keys))
    else:
        seen = pairs.j < pairs.keys
    if pairs.cells is not None:
        seen = seen & pairs.cells
    return seen


@triton.jit
def mask_out(x, pairs, value, variant, VARIANT: tl.constexpr):
    """`x`, and `value` where the query does not see the key."""
    if pairs.edge:
        x = tl.where(seen_pairs(pairs, variant, VARIANT), x, value)
    return x


@triton.jit
def pairs_under(pairs, head):
    """The same pairs under another head that sees the same keys."""
    return Pairs(pairs.n, pairs.j, head, pairs.queries, pairs.keys, pairs.edge, pairs.cells)


@triton.jit
def sees_any_key(n, queries, keys, variant, VARIANT: tl.constexpr):
    """Whether query token `n` sees a key at all; otherwise it is fully masked."""
    begin, end = _key_range(n, queries, keys, variant, VARIANT)
    any_key = begin < end
    if VARIANT.prefix:
        any_key = any_key | (keys > 0)
    return (n < queries) & any_key
