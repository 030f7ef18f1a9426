# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""The masks of attention: which queries of a row see which of its keys, tile by tile and pair by pair.

Most tiles of long rows have no edge: all of their pairs are seen, and kernels compare nothing. `variant` and `VARIANT`
are those of `_attention_variant.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from interformer_kernels._triton._arguments import RowTask


class Pairs(NamedTuple):
    """A tile of pairs of a query and a key, one for each score: the query's token in the row and its head, the key's
    token in the row, and the row, all of which broadcast to the tile. Tiles of the backward of keys have keys as rows.

    `edge`: whether some pairs may be masked out; `cells`: a mask of the pairs that are in one cell, or None.
    """

    n: Any
    j: Any
    head: Any
    task: RowTask
    edge: Any
    cells: Any


# ---------------------------------------------------------------- the keys of a query
# A query sees the history keys, all but the row's targets, in `[begin, end)` and in the prefix `[0, prefix)`; a target
# sees its own key, too. Tiles compare keys with these bounds: a mask costs one comparison a side, however many options
# make it.


@triton.jit
def targets_of(row, rows, queries, keys, variant, VARIANT: tl.constexpr):
    """The targets of a row (or of each of a tile of rows): so many of its last queries and keys."""
    targets = keys * 0
    if VARIANT.targets:
        given = tl.load(variant.inputs.num_targets + row, mask=row < rows, other=0)
        targets = tl.minimum(tl.maximum(given, 0), tl.minimum(queries, keys)).to(tl.int32)
    return targets


@triton.jit
def _history(keys, targets, VARIANT: tl.constexpr):
    """The keys of a row that are no targets."""
    history = keys
    if VARIANT.targets:
        history = keys - targets
    return history


@triton.jit
def place_of(n, queries, keys, targets, VARIANT: tl.constexpr):
    """Where query token `n` stands: the last query at the last key, but targets behind the history."""
    p = n + (keys - queries)
    if VARIANT.targets:
        p = tl.minimum(p, keys - targets)
    return p


@triton.jit
def _key_range(n_first, n_last, queries, keys, targets, variant, VARIANT: tl.constexpr):
    """The history keys `[begin, end)` that some of the query tokens `n_first` to `n_last` see besides the prefix."""
    p_first = place_of(n_first, queries, keys, targets, VARIANT)
    p_last = place_of(n_last, queries, keys, targets, VARIANT)
    history = _history(keys, targets, VARIANT)
    begin = p_first * 0
    end = begin + history
    if VARIANT.causal:
        end = tl.minimum(end, p_last + 1)
    without_window = end
    if VARIANT.right:
        end = tl.minimum(end, p_last + variant.right + 1)
    if VARIANT.left:
        begin = tl.maximum(begin, p_first - variant.left)
        if VARIANT.prefix == "index":
            # The prefix is one place, so a window that reaches its last key has all of it.
            begin = tl.where(begin < variant.prefix, 0, begin)
    if VARIANT.full_tail:
        in_tail = n_last >= queries - targets - variant.inputs.full_tail
        begin = tl.where(in_tail, 0, begin)
        end = tl.where(in_tail, without_window, end)
    if VARIANT.prefix == "full":
        in_prefix = n_first < variant.prefix
        if VARIANT.targets:
            in_prefix = in_prefix & (n_first < queries - targets)
        begin = tl.where(in_prefix, 0, begin)
        end = tl.where(in_prefix, history, end)
    if VARIANT.prefix == "index":
        begin = tl.where(p_first < variant.prefix, 0, begin)
        end = tl.where(p_first < variant.prefix, history, end)
    return begin, end


@triton.jit
def _prefix_end(n, queries, keys, targets, variant, VARIANT: tl.constexpr):
    """The end of the prefix that query token `n` sees, whatever its window."""
    end = tl.minimum(variant.prefix, _history(keys, targets, VARIANT))
    if VARIANT.prefix == "keys" and VARIANT.causal:
        end = tl.minimum(end, place_of(n, queries, keys, targets, VARIANT) + 1)
    return end


# ---------------------------------------------------------------- tiles


@triton.jit
def key_tiles(n_first, n_last, queries, keys, targets, variant, TOKENS: tl.constexpr, VARIANT: tl.constexpr):
    """Tiles of `TOKENS` keys that queries `n_first` to `n_last` see: `[0, before)`, `[start, stop)`, and those of
    targets, `[own, own_stop)` (`tile_of_step`)."""
    begin, end = _key_range(n_first, n_last, queries, keys, targets, variant, VARIANT)
    before = keys * 0
    if VARIANT.prefix == "full" or VARIANT.prefix == "keys":
        before = tl.cdiv(tl.maximum(_prefix_end(n_last, queries, keys, targets, variant, VARIANT), 0), TOKENS)
    start = tl.maximum(begin // TOKENS, before)
    stop = tl.maximum(tl.cdiv(tl.maximum(end, 0), TOKENS), start)
    own = stop
    own_stop = stop
    if VARIANT.targets:
        shift = keys - queries
        own = tl.maximum(tl.maximum(n_first + shift, keys - targets) // TOKENS, stop)
        own_stop = tl.maximum(tl.where(n_last >= queries - targets, tl.cdiv(n_last + shift + 1, TOKENS), own), own)
    return before, start, stop, own, own_stop


@triton.jit
def query_tiles(
    j_first, j_last, queries, keys, targets, variant, HEADS: tl.constexpr, BLOCK: tl.constexpr, VARIANT: tl.constexpr
):
    """Tiles of `BLOCK` packed rows that see some of the keys `j_first` to `j_last`: `[0, before)`, `[start, stop)`, and
    `[own, own_stop)`, those of full tails and of targets (`tile_of_step`)."""
    shift = keys - queries
    history = _history(keys, targets, VARIANT)
    last = j_last
    if VARIANT.targets:
        last = tl.minimum(last, history - 1)
    if VARIANT.left and VARIANT.prefix == "index":
        last = tl.where(j_first < variant.prefix, tl.maximum(last, variant.prefix - 1), last)
    begin = keys * 0
    end = queries
    if VARIANT.causal:
        begin = tl.maximum(begin, j_first - shift)
    without_window = begin
    if VARIANT.right:
        begin = tl.maximum(begin, j_first - shift - variant.right)
    if VARIANT.left:
        end = tl.minimum(end, last - shift + variant.left + 1)
        if VARIANT.targets:
            end = tl.where(end > queries - targets, queries, end)
    if VARIANT.full_tail:
        begin = tl.maximum(tl.minimum(begin, queries - targets - variant.inputs.full_tail), without_window)
    before = keys * 0
    if VARIANT.prefix == "full":
        before = tl.cdiv(tl.minimum(variant.prefix, queries) * HEADS, BLOCK)
    if VARIANT.prefix == "index":
        before = tl.cdiv(tl.minimum(tl.maximum(variant.prefix - shift, 0), queries) * HEADS, BLOCK)
    if VARIANT.prefix == "full" or VARIANT.prefix == "index":
        begin = tl.where(j_first < variant.prefix, 0, begin)
    if VARIANT.prefix == "keys":
        begin = tl.where(j_first < variant.prefix, without_window, begin)
    if VARIANT.prefix == "full" or VARIANT.prefix == "keys":
        end = tl.where(j_first < variant.prefix, queries, end)
    if VARIANT.targets:
        # Keys of targets alone.
        end = tl.where(j_first < history, end, 0)
        before = tl.where(j_first < history, before, 0)
    start = tl.maximum(begin * HEADS // BLOCK, before)
    stop = tl.maximum(tl.cdiv(tl.maximum(end, 0) * HEADS, BLOCK), start)
    own = stop
    own_stop = stop
    if VARIANT.targets:
        own_first = tl.maximum(j_first, history) - shift
        own_end = tl.where(j_last >= history, j_last + 1 - shift, 0)
        if VARIANT.full_tail:
            sees_all = j_first < history
            own_first = tl.where(sees_all, queries - targets - variant.inputs.full_tail, own_first)
            own_end = tl.where(sees_all, queries, own_end)
        own = tl.maximum(tl.maximum(own_first, 0) * HEADS // BLOCK, stop)
        own_stop = tl.maximum(tl.cdiv(own_end * HEADS, BLOCK), own)
    elif VARIANT.full_tail:
        own = tl.maximum(tl.maximum(queries - variant.inputs.full_tail, 0) * HEADS // BLOCK, stop)
        own_stop = tl.maximum(tl.cdiv(queries * HEADS, BLOCK), own)
    return before, start, stop, own, own_stop


@triton.jit
def number_of_tiles(tiles, VARIANT: tl.constexpr):
    """How many tiles the intervals of `key_tiles` or `query_tiles` have."""
    before, start, stop, own, own_stop = tiles
    number = before + stop - start
    if VARIANT.targets or VARIANT.full_tail:
        number += own_stop - own
    return number


@triton.jit
def tile_of_step(step, tiles, VARIANT: tl.constexpr):
    """The tile of a step over the intervals of `key_tiles` or `query_tiles`."""
    before, start, stop, own, _ = tiles
    i = tl.where(step < before, step, start + step - before)
    if VARIANT.targets or VARIANT.full_tail:
        i = tl.where(i < stop, i, own + i - stop)
    return i


@triton.jit
def has_edge(n_first, n_last, j_first, j_last, queries, keys, targets, variant, VARIANT: tl.constexpr):
    """Whether masks may keep some of the queries `n_first` to `n_last` from some of the keys `j_first` to `j_last`."""
    p_first = place_of(n_first, queries, keys, targets, VARIANT)
    p_last = place_of(n_last, queries, keys, targets, VARIANT)
    edge = keys < 0
    if VARIANT.causal:
        edge = edge | (j_last > p_first)
    outside_causal = edge
    if VARIANT.right:
        edge = edge | (j_last > p_first + variant.right)
    if VARIANT.left:
        edge = edge | (j_first < p_last - variant.left)
    if VARIANT.full_tail:
        edge = outside_causal | (edge & (n_first < queries - targets - variant.inputs.full_tail))
    if VARIANT.targets:
        edge = edge | (j_last >= keys - targets)
    return edge


@triton.jit
def tile_has_edge(i_k, tokens, task, variant, TOKENS: tl.constexpr, VARIANT: tl.constexpr):
    """`has_edge` of the query tokens from the first to the last and of a tile of keys, which may end behind the row."""
    n_first, n_last = tokens
    j_last = i_k * TOKENS + TOKENS - 1
    edge = has_edge(n_first, n_last, i_k * TOKENS, j_last, task.count, task.keys, task.targets, variant, VARIANT)
    return edge | (j_last >= task.keys)


# ---------------------------------------------------------------- pairs


@triton.jit
def seen_pairs(pairs, variant, VARIANT: tl.constexpr):
    """Which queries see which keys. Queries behind the row's last see some, too: their numbers are zeros, and their
    results are not stored."""
    task = pairs.task
    if VARIANT.masked:
        begin, end = _key_range(pairs.n, pairs.n, task.count, task.keys, task.targets, variant, VARIANT)
        seen = pairs.j < end
        if VARIANT.left:
            seen = seen & (pairs.j >= begin)
        if VARIANT.prefix == "full" or VARIANT.prefix == "keys":
            seen = seen | (pairs.j < _prefix_end(pairs.n, task.count, task.keys, task.targets, variant, VARIANT))
        if VARIANT.targets:
            own = pairs.n + (task.keys - task.count)
            seen = seen | ((pairs.j == own) & (own >= task.keys - task.targets))
    else:
        seen = pairs.j < task.keys
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
    return Pairs(pairs.n, pairs.j, head, pairs.task, pairs.edge, pairs.cells)


@triton.jit
def sees_any_key(n, queries, keys, targets, variant, VARIANT: tl.constexpr):
    """Whether query token `n` sees a key at all; otherwise it is fully masked."""
    begin, end = _key_range(n, n, queries, keys, targets, variant, VARIANT)
    any_key = begin < end
    if VARIANT.prefix == "full" or VARIANT.prefix == "keys":
        any_key = any_key | (_prefix_end(n, queries, keys, targets, variant, VARIANT) > 0)
    if VARIANT.targets:
        any_key = any_key | (n >= queries - targets)
    return (n < queries) & any_key
