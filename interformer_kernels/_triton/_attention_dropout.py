# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Dropout of attention's weights: which pairs of a query and a key it leaves, and by what factor those grow.

Words are those of Philox4x32 of 7 rounds, four for adjacent keys of a row (docs/ops.md). They depend on the key, the
head and the number of the query alone, so every kernel sees the same weights dropped. `variant` and `VARIANT` are those
of `_attention_variant.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUNDS = tl.constexpr(7)


@triton.jit
def _words(fours, pairs, variant):
    """The four words of adjacent keys, of which the first is number `4 * fours` in its row."""
    seed = tl.load(variant.inputs.dropout_seed)
    query = pairs.task.first + pairs.n
    head = (pairs.head + query * 0).to(tl.uint32)
    return tl.philox(seed, fours.to(tl.uint32), head, query.to(tl.uint32), (query >> 32).to(tl.uint32), _ROUNDS)


@triton.jit
def _is_kept(word, variant):
    return (word ^ 0x80000000).to(tl.int32, bitcast=True) >= variant.inputs.drop_below


@triton.jit
def _kept_by_pairs(pairs, variant):
    """Whether weights are kept, of any keys: four words are made for one."""
    j = pairs.j + variant.skip
    a, b, c, d = _words(j // 4, pairs, variant)
    return _is_kept(tl.where(j % 4 < 2, tl.where(j % 4 == 0, a, b), tl.where(j % 4 == 2, c, d)), variant)


@triton.jit
def _kept_by_fours(pairs, variant):
    """Whether weights are kept, where every four keys of the tile have words of one counter."""
    KEYS_ARE_ROWS: tl.constexpr = pairs.j.shape[1] == 1
    FOURS: tl.constexpr = pairs.j.shape[0] * pairs.j.shape[1] // 4
    fours = tl.max(tl.reshape(pairs.j + variant.skip, [FOURS, 4]), 1) // 4
    fours = tl.expand_dims(fours, 1 if KEYS_ARE_ROWS else 0)
    a, b, c, d = _words(fours, pairs, variant)
    # [.., .., 2, 2]: the last axis is the lower digit of a key.
    kept = tl.join(
        tl.join(_is_kept(a, variant).to(tl.int8), _is_kept(c, variant).to(tl.int8)),
        tl.join(_is_kept(b, variant).to(tl.int8), _is_kept(d, variant).to(tl.int8)),
    )
    if KEYS_ARE_ROWS:
        kept = tl.reshape(tl.permute(kept, [0, 2, 3, 1]), [4 * FOURS, a.shape[1]])
    else:
        kept = tl.reshape(kept, [a.shape[0], 4 * FOURS])
    return kept > 0


@triton.jit
def kept_weights(pairs, variant, VARIANT: tl.constexpr):
    """The factors of weights under dropout: 0 for those that are dropped."""
    if VARIANT.dropout == "all":
        factors = tl.full([], 0.0, tl.float32)
    elif VARIANT.dropout == "fours":
        factors = tl.where(_kept_by_fours(pairs, variant), variant.inputs.kept_scale, 0.0)
    else:
        tl.static_assert(VARIANT.dropout == "pairs")
        factors = tl.where(_kept_by_pairs(pairs, variant), variant.inputs.kept_scale, 0.0)
    return factors
