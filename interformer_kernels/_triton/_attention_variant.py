# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""The variant of attention: how scores are mapped and masked, and the derivatives of that.

All attention kernels come here: the forward, the passes for sums, for dQ and for dK with dV, and the kernels of short
rows. An additive bias, dropout or another mask goes into the tuples below and into the functions that take them: each
that maps scores knows their `Pairs` of query and key. Kernels pass the tuples on, and know none of their fields but
`seen`. Masks apply after a pointwise map: a hidden key adds nothing to the sum over keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from interformer_kernels._calls import AttentionCall
from interformer_kernels._triton._maps import LN_2, LOG2_E, activate, activation_grad, exp2, power

# ---------------------------------------------------------------- tuples: from a call, and made in kernels


class VariantInputs(NamedTuple):
    """Numbers and tensors that scores are mapped and masked by: fields of the call, of the same names."""

    scale: Any
    post_scale: Any

    @classmethod
    def of(cls, call: AttentionCall) -> VariantInputs:
        """The fields of a call."""
        return cls(*(getattr(call, name) for name in cls._fields))


class VariantOptions(NamedTuple):
    """The map of scores, and which masks there are."""

    score: str
    causal: bool
    left: bool
    right: bool
    prefix: bool

    @classmethod
    def of(cls, call: AttentionCall) -> VariantOptions:
        """The options of a call; which limits of masks it has, but not how large they are."""
        return cls(call.score, call.causal, call.window_left >= 0, call.window_right >= 0, call.num_prefix > 0)


class Variant(NamedTuple):
    """The inputs of the variant, and the limits of masks."""

    inputs: VariantInputs
    left: Any
    right: Any
    prefix: Any


class Pairs(NamedTuple):
    """A tile of pairs of a query and a key, one for each score: the query's token in the row and its head, the key's
    token in the row, the row's numbers of queries and keys, and whether the query sees the key.

    All of them broadcast to the tile. Tiles of the backward of keys have keys as rows.
    """

    n: Any
    j: Any
    head: Any
    queries: Any
    keys: Any
    seen: Any


@triton.jit
def make_variant(inputs, left, right, prefix):
    """The variant, from the kernels' arguments."""
    return Variant(VariantInputs(*inputs), left, right, prefix)


# ---------------------------------------------------------------- masks


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
    """The keys `[begin, end)` that query token `n` sees besides those of the prefix; none behind the row's queries.

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
    return begin, tl.where(n < queries, end, 0)


@triton.jit
def pairs_of(n, j, head, queries, keys, variant, VARIANT: tl.constexpr):
    """The pairs of query tokens `n` under `head` and key tokens `j`: tiles that broadcast."""
    if VARIANT.causal or VARIANT.right or VARIANT.left:
        begin, end = _key_range(n, queries, keys, variant, VARIANT)
        seen = j < end
        if VARIANT.left:
            seen = seen & (j >= begin)
        if VARIANT.prefix:
            seen = seen | (j < tl.where(n < queries, tl.minimum(variant.prefix, keys), 0))
    else:
        # Bounds of each query would take registers that kernels of packed heads lack.
        seen = (n < queries) & (j < keys)
    return Pairs(n, j, head, queries, keys, seen)


@triton.jit
def pairs_where(pairs, mask):
    """The same pairs, of which those outside of a mask are not seen."""
    return Pairs(pairs.n, pairs.j, pairs.head, pairs.queries, pairs.keys, pairs.seen & mask)


@triton.jit
def pairs_under(pairs, head):
    """The same pairs under another head that sees the same keys."""
    return Pairs(pairs.n, pairs.j, head, pairs.queries, pairs.keys, pairs.seen)


@triton.jit
def sees_any_key(n, queries, keys, variant, VARIANT: tl.constexpr):
    """Whether query token `n` sees a key at all; otherwise it is fully masked."""
    begin, end = _key_range(n, queries, keys, variant, VARIANT)
    any_key = begin < end
    if VARIANT.prefix:
        any_key = any_key | ((n < queries) & (keys > 0))
    return any_key


# ---------------------------------------------------------------- scores


@triton.jit
def _scores_of(products, pairs, variant):
    """The scores of pairs, before their map, from the products `q k'`."""
    return products * variant.inputs.scale


# ---------------------------------------------------------------- the forward


@triton.jit
def spare_bits(keys):
    """`n` such that the softmax weights of `keys` keys, each at most 1, add up to at most half of `2^n`."""
    return (tl.maximum(keys, 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 125


@triton.jit
def online_softmax_update(products, pairs, row_max, row_sum, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """One more tile of products: its probabilities before normalisation, the accumulator's rescaling `alpha`,
    and the new row maximum and row sum.

    Probabilities of a softmax are scaled down by a power of two, so that their sums over values stay within float32
    where the values do. Float16 has no range for that in its operands, nor values that would need it.
    """
    if VARIANT.score == "softmax":
        x = tl.where(pairs.seen, _scores_of(products, pairs, variant), float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, 1))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        if tl.float16 == DTYPE:
            probs = tl.exp2((x - base[:, None]) * LOG2_E)
        elif tl.bfloat16 == DTYPE:
            probs = tl.exp2((x - base[:, None]) * LOG2_E - spare_bits(pairs.keys).to(tl.float32))
        else:
            # The power of two stays outside of exp2, where it would round the exponent once more.
            probs = exp2((x - base[:, None]) * LOG2_E, DTYPE) * power(-spare_bits(pairs.keys))
        alpha = exp2((row_max - base) * LOG2_E, DTYPE)
        row_sum = row_sum * alpha + tl.sum(probs, 1)
        row_max = new_max
    else:
        SCORE: tl.constexpr = VARIANT.score
        mapped = variant.inputs.post_scale * activate(_scores_of(products, pairs, variant), SCORE, DTYPE)
        probs = tl.where(pairs.seen, mapped, 0.0)
        alpha = row_sum * 0.0 + 1.0
    return probs, alpha, row_max, row_sum


@triton.jit
def split_alpha(split_max, row_max, DTYPE: tl.constexpr):
    """The factor that brings sums over a split of a row's keys from the split's maximum to the row's."""
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    return exp2((split_max - base) * LOG2_E, DTYPE)


@triton.jit
def finalize(acc, row_max, row_sum, keys, any_key, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """Attention outputs and the log-sum-exp; `any_key`: queries that are not fully masked."""
    if VARIANT.score == "softmax":
        # A fully masked row has the sum 0, and the output 0.
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
        if tl.float32 == DTYPE:
            mean = tl.div_rn(acc, row_sum[:, None])
            limit = 3.4028234663852886e38
        elif tl.bfloat16 == DTYPE:
            mean = acc / row_sum[:, None]
            limit = 3.3895313892515355e38
        else:
            mean = acc / row_sum[:, None]
            limit = 65504.0
        # A mean of finite values is no larger than the largest of them, but its rounding may be.
        inside = tl.where(mean > limit, limit, tl.where(mean < -limit, -limit, mean))
        mean = tl.where(tl.abs(acc) < float("inf"), inside, mean)
        # A row whose scores are all -inf gives NaN, as in PyTorch.
        acc = tl.where((any_key & (row_max == float("-inf")))[:, None], float("nan"), mean)
        if tl.float16 != DTYPE:
            row_sum = row_sum * power(spare_bits(keys))
        lse = row_max + tl.log2(row_sum) * LN_2
    else:
        lse = row_max
    return acc, lse


# ---------------------------------------------------------------- the backward


@triton.jit
def scaled(d_scores, scale, DTYPE: tl.constexpr):
    """Gradients of scores as operands of dQ and dK: times `scale`, so that no sum overflows that `scale` would bring
    back. In float16 small gradients would lose digits; there `remaining_scale` multiplies the sums instead.
    """
    if tl.float16 == DTYPE:
        operand = d_scores
    else:
        operand = d_scores * scale
    return operand


@triton.jit
def remaining_scale(keys, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """The factor of a row's sums over `scaled` gradients, where the row has `keys` keys."""
    factor = (keys * 0).to(tl.float32) + 1.0
    if tl.float16 == DTYPE:
        factor = factor * variant.inputs.scale
    if VARIANT.score == "softmax":
        # The softmax of a single key is constant, whatever `dP - delta` rounds to.
        factor = tl.where(keys == 1, 0.0, factor)
    return factor


@triton.jit
def _activation_backward(products, d_probs, pairs, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """Unscaled activations of the scores, and gradients of the products but for `remaining_scale`."""
    SCORE: tl.constexpr = VARIANT.score
    x = _scores_of(products, pairs, variant)
    probs = tl.where(pairs.seen, activate(x, SCORE, DTYPE), 0.0)
    grad = activation_grad(x, SCORE, DTYPE)
    d_scores = tl.where(pairs.seen, scaled(grad * d_probs, variant.inputs.scale, DTYPE), 0.0)
    if SCORE == "relu":
        # A derivative of 0 gives a gradient of 0, even where `d_probs` overflowed.
        d_scores = tl.where(x <= 0, 0.0, d_scores)
    return probs, d_scores


@triton.jit
def _softmax_backward(probs, d_probs, delta, pairs, variant, DTYPE: tl.constexpr):
    """Gradients of the products but for `remaining_scale`; masked ones are 0 even where a number is not finite."""
    return tl.where(pairs.seen, scaled(probs * (d_probs - delta), variant.inputs.scale, DTYPE), 0.0)


@triton.jit
def scores_to_probs(
    products, d_probs, pairs, lse, log2_row_sum, delta, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr
):
    """Probabilities, or unscaled activations, and gradients of the products but for `remaining_scale`, from statistics
    of the queries that broadcast.

    `log2_row_sum`: of a query's probabilities by its log-sum-exp; in float32 the caller divides by their sum instead.
    """
    if VARIANT.score == "softmax":
        # lse = -inf: the query is fully masked, or its scores are all -inf and its probabilities NaN.
        x = (_scores_of(products, pairs, variant) - lse) * LOG2_E
        if tl.float32 != DTYPE:
            x = x - log2_row_sum
        probs = tl.where(pairs.seen, exp2(x, DTYPE), 0.0)
        d_scores = _softmax_backward(probs, d_probs, delta, pairs, variant, DTYPE)
    else:
        probs, d_scores = _activation_backward(products, d_probs, pairs, variant, VARIANT, DTYPE)
    return probs, d_scores


@triton.jit
def whole_row_to_probs(products, d_probs, pairs, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """`scores_to_probs` where a tile holds all keys of its rows, so that no statistics are needed."""
    zeros = tl.full([products.shape[0]], 0.0, tl.float32)
    if VARIANT.score == "softmax":
        probs, _, row_max, row_sum = online_softmax_update(
            products, pairs, zeros + float("-inf"), zeros, variant, VARIANT, DTYPE
        )
        # A row whose scores are all -inf gives NaN, as in PyTorch.
        row_sum = tl.where(row_max == float("-inf"), float("nan"), row_sum)
        probs = tl.where(pairs.seen, probs * tl.div_rn(1.0, row_sum)[:, None], 0.0)
        delta = tl.sum(tl.where(pairs.seen, probs * d_probs, 0.0), 1)
        d_scores = _softmax_backward(probs, d_probs, delta[:, None], pairs, variant, DTYPE)
    else:
        probs, d_scores = _activation_backward(products, d_probs, pairs, variant, VARIANT, DTYPE)
    return probs, d_scores
