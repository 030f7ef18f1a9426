# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""How attention's kernels map scores to weights, and the derivatives of that.

All attention kernels come here: the forward, the passes for sums, for dQ and for dK with dV, and the kernels of short
rows. Scores are made in `_attention_scores.py`, masks in `_attention_masks.py`. Masks apply after a pointwise map: a
hidden key adds nothing to the sum over keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from interformer_kernels._triton._attention_dropout import kept_weights
from interformer_kernels._triton._attention_masks import mask_out, seen_pairs
from interformer_kernels._triton._attention_scores import raw_scores, score_factor, through_softcap
from interformer_kernels._triton._maps import LN_2, LOG2_E, activate, activation_grad, exp2, power

# The start of a running maximum: finite, so that no difference of maxima is NaN.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
# Exponents of 2 stay below four times this number, so that they have a digit behind the point.
_LARGE = tl.constexpr(2.0**21)
# From this |lse| on its rounding shows in probabilities of 16 bits.
_LARGE_LSE = tl.constexpr(1024.0)
# Sums of a query that are kept apart: adjacent keys of a tile are in different threads.
_SUM_LANES = tl.constexpr(8)


class QueryStats(NamedTuple):
    """Statistics of queries for the backward of a softmax: the factor and the base that turn raw scores into logarithms
    of probabilities; the sum of these probabilities; the factor of dP; and delta, less dlse, times the latter."""

    factor: Any
    base: Any
    row_sum: Any
    scale: Any
    delta: Any


# ---------------------------------------------------------------- the forward


@triton.jit
def spare_bits(keys):
    """`n` such that the softmax weights of `keys` keys, each at most 1, add up to at most half of `2^n`."""
    return (tl.maximum(keys, 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 125


@triton.jit
def empty_softmax(BLOCK: tl.constexpr):
    """Row maximum and row sum of `BLOCK` queries before the first tile of an online softmax."""
    return tl.full([BLOCK], _LOWEST, tl.float32), tl.full([BLOCK, _SUM_LANES], 0.0, tl.float32)


@triton.jit
def _base_2(row_max, variant, VARIANT: tl.constexpr):
    """The factor of each query that turns raw scores into exponents of 2, and the exponent of the row maximum.

    A fused multiply-add takes the rounded exponent of the maximum from the exact exponent of a score. The difference of
    the two is small, and the same for all keys, as long as exponents have a digit behind the point. Beyond, a power of
    two replaces the factor, which leaves the maximum exact: it tells apart whatever 16 bits do.
    """
    # 2^(1 - e) for a maximum from 2^e on; infinity for 0.
    inverse = (~row_max.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    factor = tl.minimum(score_factor(variant, VARIANT) * (LOG2_E / _LARGE), inverse) * _LARGE
    return factor, row_max * factor


@triton.jit
def online_softmax_update(products, pairs, row_max, row_sum, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """One more tile of products: its weights before normalisation, the accumulator's rescaling `alpha`, and the new row
    maximum and row sum, which begin as `empty_softmax` and end by `softmax_stats`.

    The row maximum is that of scores in float32, and of raw scores in 16 bits. The row sum is one of every eighth key,
    so that no threads have to add theirs. Probabilities of a softmax are scaled down by a power of two, so that their
    sums over values stay within float32 where the values do. Float16 has no range for that in its operands, nor values
    that would need it.
    """
    if VARIANT.score == "softmax":
        if tl.float32 == DTYPE:
            x = raw_scores(products, pairs, variant, VARIANT, DTYPE) * score_factor(variant, VARIANT)
            x = mask_out(x, pairs, float("-inf"), variant, VARIANT)
            new_max = tl.maximum(row_max, tl.max(x, 1))
            # The power of two stays outside of exp2, where it would round the exponent once more.
            probs = exp2((x - new_max[:, None]) * LOG2_E, DTYPE) * power(-spare_bits(pairs.task.keys))
            alpha = exp2((row_max - new_max) * LOG2_E, DTYPE)
        else:
            x = raw_scores(products, pairs, variant, VARIANT, DTYPE)
            x = mask_out(x, pairs, float("-inf"), variant, VARIANT)
            new_max = tl.maximum(row_max, tl.max(x, 1))
            factor, base = _base_2(new_max, variant, VARIANT)
            alpha = tl.exp2((row_max - new_max) * factor)
            base = base[:, None]
            if tl.bfloat16 == DTYPE:
                base += spare_bits(pairs.task.keys).to(tl.float32)
            probs = tl.exp2(tl.fma(x, factor[:, None], -base))
        lanes = tl.reshape(probs, [probs.shape[0], probs.shape[1] // _SUM_LANES, _SUM_LANES])
        row_sum = row_sum * alpha[:, None] + tl.sum(lanes, 1)
        row_max = new_max
    else:
        SCORE: tl.constexpr = VARIANT.score
        x = raw_scores(products, pairs, variant, VARIANT, DTYPE) * score_factor(variant, VARIANT)
        mapped = variant.inputs.post_scale * activate(x, SCORE, DTYPE)
        probs = mask_out(mapped, pairs, 0.0, variant, VARIANT)
        alpha = tl.full([products.shape[0]], 1.0, tl.float32)
    if VARIANT.dropout != "":
        probs = probs * kept_weights(pairs, variant, VARIANT)
    return probs, alpha, row_max, row_sum


@triton.jit
def softmax_stats(row_max, row_sum, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """The largest score and the row sum of each query after the last tile. The former is -inf where the query is fully
    masked, or its scores are all -inf, and NaN beyond float32."""
    row_sum = tl.sum(row_sum, 1)
    if VARIANT.score == "softmax":
        if tl.float32 != DTYPE:
            row_max = row_max * score_factor(variant, VARIANT)
            row_max = tl.where(row_max == float("inf"), float("nan"), row_max)
        row_max = tl.where(row_sum == 0.0, float("-inf"), row_max)
    return row_max, row_sum


@triton.jit
def split_alpha(split_max, row_max, DTYPE: tl.constexpr):
    """The factor that brings sums over a split of a row's keys from the split's maximum to the row's."""
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    return exp2((split_max - base) * LOG2_E, DTYPE)


@triton.jit
def add_sink(acc, row_max, row_sum, sink, keys, DTYPE: tl.constexpr):
    """The sums of a softmax over all keys, and one more key, whose score is `sink` and whose value is 0."""
    largest = tl.maximum(row_max, sink)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    alpha = exp2((row_max - base) * LOG2_E, DTYPE)
    probs = exp2((sink - base) * LOG2_E, DTYPE)
    if tl.float16 != DTYPE:
        probs = probs * power(-spare_bits(keys))
    return acc * alpha[:, None], largest, row_sum * alpha + probs


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
        if VARIANT.dropout == "":
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
def bias_gradients(products, d_probs, pairs, lse, row_sum, delta, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """Gradients of scores, which are those of their biases, from statistics of queries, the rows of the tile."""
    SCORE: tl.constexpr = VARIANT.score
    x = raw_scores(products, pairs, variant, VARIANT, DTYPE) * score_factor(variant, VARIANT)
    if VARIANT.score == "softmax":
        if tl.float32 == DTYPE:
            probs = exp2((x - lse[:, None]) * LOG2_E, DTYPE) * tl.div_rn(1.0, row_sum)[:, None]
        else:
            probs = exp2((x - lse[:, None]) * LOG2_E - row_sum[:, None], DTYPE)
        grads = probs * (without_single_keys(d_probs, pairs, VARIANT) - delta[:, None])
        if not VARIANT.grad_lse and not VARIANT.sinks:
            grads = grads * factor_of_d_probs(pairs.task.keys)
    else:
        grads = activation_grad(x, SCORE, DTYPE) * d_probs
        if SCORE == "relu":
            grads = tl.where(x <= 0, 0.0, grads)
    return tl.where(seen_pairs(pairs, variant, VARIANT) & (pairs.n < pairs.task.count), grads, 0.0)


@triton.jit
def is_large(lse):
    """Whether a log-sum-exp has lost digits that probabilities of 16 bits would show."""
    return (tl.abs(lse) >= _LARGE_LSE) & (tl.abs(lse) < float("inf"))


@triton.jit
def _scaled(d_scores, scale, DTYPE: tl.constexpr):
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
    """The factor of a row's sums over gradients of scores, where the row has `keys` keys."""
    factor = (keys * 0).to(tl.float32) + 1.0
    if tl.float16 == DTYPE:
        factor = factor * variant.inputs.scale
    if VARIANT.score == "softmax":
        if tl.bfloat16 == DTYPE:
            factor = factor * tl.maximum(variant.inputs.scale, 1.0)
        if not VARIANT.grad_lse and not VARIANT.sinks:
            # The softmax of a single key is constant, whatever `dP - delta` rounds to.
            factor = tl.where(keys == 1, 0.0, factor)
    return factor


@triton.jit
def factor_of_d_probs(keys):
    """The factor of dP and delta, 0 for a single key, beside a gradient of the log-sum-exp: else it would be in
    `remaining_scale`."""
    return tl.where(keys == 1, 0.0, 1.0)


@triton.jit
def without_single_keys(d_probs, pairs, VARIANT: tl.constexpr):
    """Gradients of probabilities times `factor_of_d_probs`."""
    if VARIANT.grad_lse and not VARIANT.sinks:
        d_probs = d_probs * factor_of_d_probs(pairs.task.keys)
    return d_probs


@triton.jit
def grad_of_seen_lse(grad_lse, masked):
    """The gradient of the log-sum-exp, 0 where a query is fully masked, whatever is given there."""
    return tl.where(masked, 0.0, grad_lse)


@triton.jit
def _activation_backward(products, d_probs, pairs, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """Unscaled activations of the scores, and gradients of the products but for `remaining_scale`."""
    SCORE: tl.constexpr = VARIANT.score
    x = raw_scores(products, pairs, variant, VARIANT, DTYPE) * score_factor(variant, VARIANT)
    probs = activate(x, SCORE, DTYPE)
    grad = activation_grad(x, SCORE, DTYPE)
    d_scores = _scaled(grad * d_probs, variant.inputs.scale, DTYPE)
    d_scores = through_softcap(d_scores, products, variant, VARIANT, DTYPE)
    if SCORE == "relu":
        # A derivative of 0 gives a gradient of 0, even where `d_probs` overflowed.
        d_scores = tl.where(x <= 0, 0.0, d_scores)
    if pairs.edge:
        seen = seen_pairs(pairs, variant, VARIANT)
        probs = tl.where(seen, probs, 0.0)
        d_scores = tl.where(seen, d_scores, 0.0)
    return probs, d_scores


@triton.jit
def _scale_of_d_probs(variant, DTYPE: tl.constexpr):
    """The factor of dP in 16 bits, see `_scaled`: there it costs nothing. A scale above 1 might overflow."""
    scale = tl.full([], 1.0, tl.float32)
    if tl.bfloat16 == DTYPE:
        scale = tl.minimum(variant.inputs.scale, 1.0)
    return scale


@triton.jit
def query_stats(lse, row_sum, delta, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr, OF_QUERIES: tl.constexpr):
    """Statistics of queries from their log-sum-exp, the sum of their probabilities by it, and delta.

    In 16 bits the sum is given as its base-2 logarithm, which corrects the rounding of the log-sum-exp. With OF_QUERIES
    gradients of queries are all that is asked for, and it goes into the factor of dP.
    """
    if tl.float32 == DTYPE or VARIANT.score != "softmax":
        stats = QueryStats(score_factor(variant, VARIANT), lse, row_sum, variant.inputs.scale, delta)
    else:
        # As in `_base_2`, but a power of two brings log-sum-exps from 2^20 on below 2^21.
        inverse = (~lse.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        cooling = tl.minimum(inverse, 4 / _LARGE)
        factor = cooling * (score_factor(variant, VARIANT) * (LOG2_E * _LARGE / 4))
        base = (lse * cooling) * (LOG2_E * _LARGE / 4)
        scale = _scale_of_d_probs(variant, DTYPE)
        if OF_QUERIES:
            scale = scale * tl.exp2(-row_sum)
        stats = QueryStats(factor, base, row_sum, scale, delta * scale)
    return stats


@triton.jit
def scores_to_probs(
    products, d_probs, pairs, stats, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr, OF_QUERIES: tl.constexpr
):
    """Probabilities, or unscaled activations, and gradients of the products but for `remaining_scale`. Queries are rows
    of the tile with OF_QUERIES, else columns.

    In float32 the caller divides by the row sum. In 16 bits with OF_QUERIES the probabilities are by it too large.
    """
    if VARIANT.score == "softmax":
        AXIS: tl.constexpr = 1 if OF_QUERIES else 0
        raw = raw_scores(products, pairs, variant, VARIANT, DTYPE)
        base = tl.expand_dims(stats.base, AXIS)
        delta = tl.expand_dims(stats.delta, AXIS)
        if tl.float32 == DTYPE:
            x = (raw * stats.factor - base) * LOG2_E
        else:
            x = tl.fma(raw, tl.expand_dims(stats.factor, AXIS), -base)
            if not OF_QUERIES:
                x = x - tl.expand_dims(stats.row_sum, AXIS)
        probs = exp2(mask_out(x, pairs, float("-inf"), variant, VARIANT), DTYPE)
        d_probs = without_single_keys(d_probs, pairs, VARIANT)
        # Masked ones are 0, unless a number is not finite.
        if tl.float32 == DTYPE:
            d_scores = probs * (d_probs - delta) * stats.scale
        elif OF_QUERIES:
            d_scores = probs * tl.fma(d_probs, tl.expand_dims(stats.scale, AXIS), -delta)
        else:
            d_scores = probs * tl.fma(d_probs, stats.scale, -delta)
        d_scores = through_softcap(d_scores, products, variant, VARIANT, DTYPE)
    else:
        probs, d_scores = _activation_backward(products, d_probs, pairs, variant, VARIANT, DTYPE)
    return probs, d_scores


@triton.jit
def whole_row_to_probs(products, d_probs, grad_lse, pairs, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """`scores_to_probs` where a tile holds all keys of its rows, so that no statistics are needed; `grad_lse` is that
    of the queries, if VARIANT has it."""
    if VARIANT.score == "softmax":
        row_max, row_sum = empty_softmax(products.shape[0])
        probs, _, _, row_sum = online_softmax_update(products, pairs, row_max, row_sum, variant, VARIANT, DTYPE)
        row_sum = tl.sum(row_sum, 1)
        # A row whose scores are all -inf gives NaN, as in PyTorch.
        inv_row_sum = tl.div_rn(1.0, tl.where(row_sum == 0.0, float("nan"), row_sum))
        probs = mask_out(probs * inv_row_sum[:, None], pairs, 0.0, variant, VARIANT)
        d_probs = without_single_keys(d_probs, pairs, VARIANT)
        delta = tl.sum(probs * d_probs, 1)
        if VARIANT.grad_lse:
            delta = delta - grad_of_seen_lse(grad_lse, row_sum == 0.0)
        if tl.float32 == DTYPE:
            d_scores = probs * (d_probs - delta[:, None]) * variant.inputs.scale
        else:
            scale = _scale_of_d_probs(variant, DTYPE)
            d_scores = probs * tl.fma(d_probs, scale, -(delta * scale)[:, None])
        d_scores = through_softcap(d_scores, products, variant, VARIANT, DTYPE)
    else:
        probs, d_scores = _activation_backward(products, d_probs, pairs, variant, VARIANT, DTYPE)
    return probs, d_scores


@triton.jit
def whole_row_probs(products, pairs, lse, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """Probabilities of 16 bits, or unscaled activations, of a tile that holds all keys of its rows.

    The softmax comes from the log-sum-exp of the queries. Those that have lost digits (`is_large`) get sums of their
    own; the others keep their bits.
    """
    SCORE: tl.constexpr = VARIANT.score
    if VARIANT.score == "softmax":
        tl.static_assert(tl.float32 != DTYPE)
        stats = query_stats(lse, lse * 0.0, lse * 0.0, variant, VARIANT, DTYPE, True)
        raw = raw_scores(products, pairs, variant, VARIANT, DTYPE)
        x = tl.fma(raw, stats.factor[:, None], -stats.base[:, None])
        large = is_large(lse)
        if tl.max(large.to(tl.int32), 0) > 0:
            row_sum = tl.sum(exp2(mask_out(x, pairs, float("-inf"), variant, VARIANT), DTYPE), 1)
            x = x - tl.where(large, tl.log2(row_sum), 0.0)[:, None]
        probs = exp2(mask_out(x, pairs, float("-inf"), variant, VARIANT), DTYPE)
    else:
        x = raw_scores(products, pairs, variant, VARIANT, DTYPE) * score_factor(variant, VARIANT)
        probs = mask_out(activate(x, SCORE, DTYPE), pairs, 0.0, variant, VARIANT)
    return probs


@triton.jit
def whole_row_d_scores(
    products, probs, d_probs, lse, grad_lse, pairs, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr
):
    """Gradients of the products of such a tile, but for `remaining_scale`; delta is a sum over the tile."""
    if VARIANT.score == "softmax":
        scale = _scale_of_d_probs(variant, DTYPE)
        d_probs = without_single_keys(d_probs, pairs, VARIANT)
        delta = tl.sum(probs * d_probs, 1) * scale
        if VARIANT.grad_lse:
            delta = delta - grad_of_seen_lse(grad_lse, lse == float("-inf")) * scale
        d_scores = probs * tl.fma(d_probs, scale, -delta[:, None])
        d_scores = through_softcap(d_scores, products, variant, VARIANT, DTYPE)
    else:
        _, d_scores = _activation_backward(products, d_probs, pairs, variant, VARIANT, DTYPE)
    return d_scores
