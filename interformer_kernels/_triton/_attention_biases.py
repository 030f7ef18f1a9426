# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Gradients of the tables of biases: sums of gradients of scores by distance, and by time between query and key.

A program goes over some tiles of queries under one head, in order, and adds to tables in memory that are its own, so no
two additions meet: under distances that the position bias tells apart, a query has one key each, so each query of a
tile has a table; bins of times may hold any keys, so each pair of a tile has one. Sums of distances beyond the table
stay in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._arguments import KeysAndValues, QuerySide, RowTask, Sizes
from interformer_kernels._triton._attention_dropout import kept_weights
from interformer_kernels._triton._attention_epilogue import load_query_stats
from interformer_kernels._triton._attention_masks import (
    Pairs,
    key_tiles,
    number_of_tiles,
    targets_of,
    tile_of_step,
)
from interformer_kernels._triton._attention_scores import Variant, VariantInputs, distances, time_bins
from interformer_kernels._triton._attention_tiles import keys_of, load_keys, load_q, load_queries
from interformer_kernels._triton._attention_variant import bias_gradients
from interformer_kernels._triton._maps import dot
from interformer_kernels._triton._rows import find

SIZES = ["rows", "q_tokens", "k_tokens", "queries", "left", "right", "prefix", "slots"]


@triton.jit
def _add(to, p, x, mask):
    """Add to numbers in memory that are this program's alone, each of them once."""
    tl.store(to + p, tl.load(to + p, mask=mask, other=0.0) + x, mask=mask)


@triton.jit
def _task(slot, offsets, sizes, variant, SHAPE: tl.constexpr, VARIANT: tl.constexpr):
    """The row of a slot, and its tile of queries, which may begin beyond the row."""
    if SHAPE.layout == "packed":
        row, first, count, tile = find(slot, offsets.q, sizes.rows, sizes.q_tokens, 1, SHAPE.block_q)
    else:
        tiles = tl.cdiv(sizes.queries, SHAPE.block_q)
        row = slot // tiles
        tile = slot % tiles
        first = row.to(tl.int64) * sizes.queries
        count = sizes.queries + row * 0
    k_first, keys = keys_of(row, offsets, sizes)
    count = tl.where(row < sizes.rows, count, 0)
    return RowTask(row, first, count, k_first, keys, targets_of(row, sizes.rows, count, keys, variant, VARIANT)), tile


@triton.jit
def _add_tile(
    side, kv, position_sums, time_sums, ends, head, task, tile, program, variant,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, FP32_SOFTMAX: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Add the gradients of a tile of queries, and return the sums of distances before and behind the table."""
    LAYOUT: tl.constexpr = SHAPE.layout
    PRECISION: tl.constexpr = SHAPE.precision
    DTYPE: tl.constexpr = kv.k.pointer.dtype.element_ty
    PAIRS: tl.constexpr = SHAPE.block_q * SHAPE.block_k
    o_q = tl.arange(0, SHAPE.block_q)
    n = tile * SHAPE.block_q + o_q
    m_in = n < task.count
    b_q = load_q(side.q, kv.rope, task.row, task.first, n, head, m_in, SHAPE)
    b_grad = load_queries(side.grad, task.row, task.first, n, head, m_in, SHAPE.dv, SHAPE.block_dv, LAYOUT)
    p_head = (task.first + n) * HEADS + head
    lse, row_sum, delta = load_query_stats(side, p_head, head, m_in, task.keys, VARIANT, FP32_SOFTMAX, True)
    n_first = tile * SHAPE.block_q
    n_last = tl.minimum(n_first + SHAPE.block_q, task.count) - 1
    tiles = key_tiles(n_first, n_last, task.count, task.keys, task.targets, variant, SHAPE.block_k, VARIANT)
    o_pair = o_q[:, None] * SHAPE.block_k + tl.arange(0, SHAPE.block_k)[None, :]
    before, behind = ends
    for step in range(0, number_of_tiles(tiles, VARIANT)):
        i_k = tile_of_step(step, tiles, VARIANT)
        j, _, b_k, b_v = load_keys(kv, head // SHAPE.q_per_kv, 0, i_k, task, SHAPE)
        pairs = Pairs(n[:, None], j[None, :], head, task, True, None)
        products = dot(b_q, tl.trans(b_k), PRECISION)
        d_probs = dot(b_grad, tl.trans(b_v), PRECISION)
        if VARIANT.dropout != "":
            d_probs = d_probs * kept_weights(pairs, variant, VARIANT)
        grads = bias_gradients(products, d_probs, pairs, lse, row_sum, delta, variant, VARIANT, DTYPE)
        if VARIANT.position:
            reach = variant.inputs.reach
            distance = distances(pairs, VARIANT) + n[:, None] * 0
            before += tl.sum(tl.where(distance <= -reach, grads, 0.0), 1)
            behind += tl.sum(tl.where((distance >= reach) & (distance > -reach), grads, 0.0), 1)
            inside = (distance > -reach) & (distance < reach) & (j < task.keys)[None, :]
            p_row = (program * SHAPE.block_q + o_q)[:, None] * (2 * reach + 1)
            _add(position_sums, p_row + distance + reach, grads, inside)
        if VARIANT.time_steps >= 0:
            bins = time_bins(pairs, variant, VARIANT)
            p_bin = (program * (variant.inputs.edges + 1) + bins) * PAIRS
            _add(time_sums, p_bin + o_pair, grads, m_in[:, None] & (j < task.keys)[None, :])
    return before, behind


@triton.jit(do_not_specialize=SIZES)
def attention_grad_biases(
    side, kv, offsets, position_sums, end_sums, time_sums,
    rows, q_tokens, k_tokens, queries, left, right, prefix, slots, variant_inputs,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, FP32_SOFTMAX: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Sums for one head over every so manieth tile of queries.

    `position_sums [programs, BLOCK_Q, 2 P + 1]`, of distances inside the table; `end_sums [programs, BLOCK_Q, 2]`, of
    those before and behind it; `time_sums [programs, bins, BLOCK_Q * BLOCK_K]`. Programs of a group have a head each.
    """
    sizes = Sizes(rows, q_tokens, k_tokens, queries, 0)
    variant = Variant(VariantInputs(*variant_inputs), left, right, prefix, 0)
    side = QuerySide(side.q, side.grad, side.lse, side.delta, side.attn_out, side.grad_lse, side.sinks)
    kv = KeysAndValues(kv.k, kv.v, kv.rope)
    program = tl.program_id(0).to(tl.int64)
    head = program % HEADS
    before = tl.full([SHAPE.block_q], 0.0, tl.float32)
    behind = tl.full([SHAPE.block_q], 0.0, tl.float32)
    for slot in range(tl.program_id(0) // HEADS, slots, tl.num_programs(0) // HEADS):
        task, tile = _task(slot, offsets, sizes, variant, SHAPE, VARIANT)
        if tile * SHAPE.block_q < task.count:
            before, behind = _add_tile(
                side, kv, position_sums, time_sums, (before, behind), head, task, tile, program, variant,
                SHAPE, VARIANT, FP32_SOFTMAX, HEADS,
            )  # fmt: skip
        # Another thread may add next to a number that this one has written.
        tl.debug_barrier()
    if VARIANT.position:
        p_ends = 2 * (program * SHAPE.block_q + tl.arange(0, SHAPE.block_q))
        tl.store(end_sums + p_ends, before)
        tl.store(end_sums + p_ends + 1, behind)
