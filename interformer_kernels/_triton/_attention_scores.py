# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""The variant of attention, and its scores: products of queries and keys under a softcap, and biases.

Each function that maps scores knows their `Pairs` of query and key. Kernels pass the tuples of the variant on, and know
none of their fields.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from interformer_kernels._calls import AttentionCall
from interformer_kernels._launch.tensors import resolved
from interformer_kernels._triton._attention_masks import place_of
from interformer_kernels._triton._maps import activate

# ---------------------------------------------------------------- tuples: from a call, and made in kernels

_MOST_INT32 = 2**31 - 1


class VariantInputs(NamedTuple):
    """Numbers and tensors that scores are mapped and masked by: fields of the call, of the same names; None where the
    variant has no use for one. Numbers stay while a model does, so kernels may be specialised by an integer.

    A weight whose word is less than `drop_below` is dropped; words are taken less 2^31, with a sign. Of a table of
    biases, `*_row` is the stride of its heads; its distances end at `reach`.
    """

    scale: Any
    post_scale: Any
    num_targets: Any = None
    full_tail: Any = None
    softcap: Any = None
    dropout_seed: Any = None
    drop_below: Any = None
    kept_scale: Any = None
    position_bias: Any = None
    position_row: Any = None
    reach: Any = None
    time_bias: Any = None
    time_row: Any = None
    times_q: Any = None
    times_k: Any = None
    time_edges: Any = None
    edges: Any = None

    @classmethod
    def of(cls, call: AttentionCall) -> VariantInputs:
        """The fields of a call."""
        given: dict[str, Any] = {}
        if call.num_targets is not None:
            given["num_targets"] = call.num_targets.contiguous()
        if call.full_tail:
            given["full_tail"] = min(call.full_tail, _MOST_INT32)
        if call.softcap:
            given["softcap"] = call.softcap
        if call.dropout_seed is not None:
            p = call.dropout_p
            given.update(dropout_seed=call.dropout_seed, drop_below=int(p * 2.0**32) - 2**31, kept_scale=1 / (1 - p))
        if call.position_bias is not None:
            table = resolved(call.position_bias).contiguous()
            given.update(position_bias=table, position_row=_head_stride(table), reach=table.shape[1] // 2)
        if call.time_bias is not None and call.times_q is not None and call.times_k is not None:
            assert call.time_edges is not None
            table, edges = resolved(call.time_bias).contiguous(), call.time_edges.contiguous()
            times = {"times_q": call.times_q.contiguous(), "times_k": call.times_k.contiguous()}
            given.update(time_bias=table, time_row=_head_stride(table), **times, time_edges=edges, edges=len(edges))
        return cls(call.scale, call.post_scale, **given)


def _head_stride(table: Tensor) -> int:
    """The stride of heads; all may share one row of a table."""
    return table.shape[1] if table.shape[0] > 1 else 0


class VariantOptions(NamedTuple):
    """The map of scores, which masks there are, and whether a backward has a gradient of the log-sum-exp.

    `masked`: whether any mask hides keys; `prefix`: the kind of prefix, "" without one; `dropout`: "" without, "all" if
    no weight is left, else whether words are made for "pairs" or for "fours" of keys; `biased`: whether scores have a
    bias; `at_end`: whether distances are from the row's end; `time_steps`: the bits of a number of edges, -1 without
    times.
    """

    score: str
    masked: bool
    causal: bool
    left: bool
    right: bool
    prefix: str
    full_tail: bool
    targets: bool
    softcap: bool
    sinks: bool
    dropout: str
    biased: bool
    position: bool
    at_end: bool
    time_steps: int
    grad_lse: bool = False

    @classmethod
    def of(cls, call: AttentionCall) -> VariantOptions:
        """The options of a call; which limits of masks it has, but not how large they are."""
        left, right, targets = call.window_left >= 0, call.window_right >= 0, call.num_targets is not None
        by_place = call.causal or left or right
        # In an empty prefix of one place are the queries that stand before the first key.
        prefix = call.prefix if by_place and (call.num_prefix > 0 or call.prefix == "index") else ""
        full_tail = call.full_tail > 0 and (left or right)
        masks = by_place or targets, call.causal, left, right, prefix, full_tail, targets
        dropout = "all" if call.dropout_p else ""
        if call.dropout_seed is not None:
            dropout = "pairs"
        position, at_end, times = call.position_bias is not None, call.queries_at_end, call.time_edges
        biases = position or times is not None, position, position and at_end, -1
        if times is not None:
            biases = *biases[:3], len(times).bit_length()
        return cls(call.score, *masks, call.softcap > 0, call.sinks is not None, dropout, *biases)


class Variant(NamedTuple):
    """The inputs of the variant, the limits of masks, and the number of keys that each row skips.

    Kernels put it together themselves: on Triton 3.6 no function can return a tuple with None in it.
    """

    inputs: VariantInputs
    left: Any
    right: Any
    prefix: Any
    skip: Any


# ---------------------------------------------------------------- biases


@triton.jit
def distances(pairs, VARIANT: tl.constexpr):
    """How far keys stand before their queries."""
    task = pairs.task
    if VARIANT.at_end:
        p = task.keys
    else:
        p = place_of(pairs.n, task.count, task.keys, task.targets, VARIANT)
    return p - pairs.j


@triton.jit
def time_bins(pairs, variant, VARIANT: tl.constexpr):
    """How many edges are at most the time between query and key; a binary search, a bit of the number at each step."""
    task = pairs.task
    time_q = tl.load(variant.inputs.times_q + (task.first + pairs.n), mask=pairs.n < task.count, other=0)
    time_k = tl.load(variant.inputs.times_k + (task.k_first + pairs.j), mask=pairs.j < task.keys, other=0)
    apart = tl.abs(time_q - time_k)
    bins = (apart * 0).to(tl.int32)
    STEPS: tl.constexpr = VARIANT.time_steps
    for i in tl.static_range(STEPS):
        more = bins + (1 << (VARIANT.time_steps - 1 - i))
        inside = more <= variant.inputs.edges
        edge = tl.load(variant.inputs.time_edges + (more - 1), mask=inside, other=0)
        bins = tl.where(inside & (edge <= apart), more, bins)
    return bins


@triton.jit
def _bias(pairs, variant, VARIANT: tl.constexpr):
    """The sum of the biases of pairs."""
    inputs = variant.inputs
    if VARIANT.position:
        distance = tl.minimum(tl.maximum(distances(pairs, VARIANT), -inputs.reach), inputs.reach) + inputs.reach
        bias = tl.load(inputs.position_bias + (pairs.head * inputs.position_row + distance))
        if VARIANT.time_steps >= 0:
            bins = time_bins(pairs, variant, VARIANT)
            bias += tl.load(inputs.time_bias + (pairs.head * inputs.time_row + bins))
    else:
        bins = time_bins(pairs, variant, VARIANT)
        bias = tl.load(inputs.time_bias + (pairs.head * inputs.time_row + bins))
    return bias


# ---------------------------------------------------------------- scores


@triton.jit
def _capped(products, variant, DTYPE: tl.constexpr):
    """The scores of products as parts of the softcap."""
    return activate(products * (variant.inputs.scale / variant.inputs.softcap), "tanh", DTYPE)


@triton.jit
def raw_scores(products, pairs, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """The scores of pairs but for `score_factor`, from the products `q k'`."""
    raw = products
    if VARIANT.softcap:
        raw = _capped(products, variant, DTYPE)
    if VARIANT.biased:
        if VARIANT.softcap:
            raw = raw * variant.inputs.softcap + _bias(pairs, variant, VARIANT)
        else:
            raw = raw * variant.inputs.scale + _bias(pairs, variant, VARIANT)
    return raw


@triton.jit
def score_factor(variant, VARIANT: tl.constexpr):
    """The scores are the raw scores times this number. It is positive in the forward of a softmax of 16 bits."""
    factor = variant.inputs.scale
    if VARIANT.softcap:
        factor = variant.inputs.softcap
    if VARIANT.biased:
        factor = tl.full([], 1.0, tl.float32)
    return factor


@triton.jit
def through_softcap(d_scores, products, variant, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """Gradients behind the softcap, from those of the scores."""
    if VARIANT.softcap:
        capped = _capped(products, variant, DTYPE)
        d_scores = d_scores * (1.0 - capped * capped)
    return d_scores
