# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Backward of the attention kernels behind the epilogue: dK with dV; `_attention_backward.py` has the formulas."""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._arguments import KeysAndValues, QuerySide, RowTask, Sizes
from interformer_kernels._triton._attention_dropout import kept_weights
from interformer_kernels._triton._attention_epilogue import load_query_stats
from interformer_kernels._triton._attention_masks import Pairs, has_edge, number_of_tiles, query_tiles, tile_of_step
from interformer_kernels._triton._attention_scores import Variant, VariantInputs
from interformer_kernels._triton._attention_tiles import (
    key_task,
    load_key_tile,
    load_q,
    load_queries,
    of_attempt,
    packed_rows,
    rows_with_nan,
    store_tokens,
    tiles_of_program,
    tokens_of_tile,
)
from interformer_kernels._triton._attention_variant import query_stats, remaining_scale, scores_to_probs
from interformer_kernels._triton._maps import dot, narrow
from interformer_kernels._triton._rope import columns, rotate_k

SIZES = ["rows", "q_tokens", "k_tokens", "queries", "skip", "left", "right", "prefix"]


@triton.jit
def _over_queries(
    b_k, b_v, side, rope, i_pack, attempt, j, o_h, j_bounds, tiles, task, variant,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, FP32_SOFTMAX: tl.constexpr,
):  # fmt: skip
    """dK but for `remaining_scale`, and dV, of a tile of keys from all queries that see some of them."""
    LAYOUT: tl.constexpr = SHAPE.layout
    PRECISION: tl.constexpr = SHAPE.precision
    HEADS: tl.constexpr = SHAPE.pack * SHAPE.q_per_kv
    acc_k = tl.full([SHAPE.block_k, SHAPE.block_d], 0.0, tl.float32)
    acc_v = tl.full([SHAPE.block_k, SHAPE.block_dv], 0.0, tl.float32)
    for step in range(0, number_of_tiles(tiles, VARIANT)):
        i_q = tile_of_step(step, tiles, VARIANT)
        n, cell, head = packed_rows(i_q, i_pack, SHAPE)
        m_q = n < of_attempt(task.count, cell, attempt, SHAPE.pack)  # [BLOCK_Q]
        b_q = load_q(side.q, rope, task.row, task.first, n, head, m_q, SHAPE)
        b_grad = load_queries(side.grad, task.row, task.first, n, head, m_q, SHAPE.dv, SHAPE.block_dv, LAYOUT)
        p_head = (task.first + n) * (SHAPE.packs * HEADS) + head
        b_lse, b_sum, b_delta = load_query_stats(side, p_head, head, m_q, task.keys, VARIANT, FP32_SOFTMAX, True)
        stats = query_stats(b_lse, b_sum, b_delta, variant, VARIANT, b_k.dtype, False)
        # [BLOCK_K, BLOCK_Q]
        if SHAPE.pack > 1:
            cells = cell[None, :] == o_h[:, None]
            pairs = Pairs(n[None, :], j[:, None], head[None, :], task, True, cells)
        elif VARIANT.masked:
            n_first, n_last = tokens_of_tile(i_q, task.count, SHAPE)
            edge = has_edge(
                n_first, n_last, j_bounds[0], j_bounds[1], task.count, task.keys, task.targets, variant, VARIANT
            )
            pairs = Pairs(n[None, :], j[:, None], head[None, :], task, edge, None)
        else:
            pairs = Pairs(n[None, :], j[:, None], head[None, :], task, False, None)
        products = dot(b_k, tl.trans(b_q), PRECISION)
        d_probs = dot(b_v, tl.trans(b_grad), PRECISION)
        if VARIANT.dropout != "":
            factors = kept_weights(pairs, variant, VARIANT)
            d_probs = d_probs * factors
        probs, d_scores = scores_to_probs(products, d_probs, pairs, stats, variant, VARIANT, b_k.dtype, False)
        if VARIANT.dropout != "":
            probs = probs * factors
        if FP32_SOFTMAX:
            inv_row_sum = tl.div_rn(1.0, b_sum)[None, :]
            probs = probs * inv_row_sum
            d_scores = d_scores * inv_row_sum
        acc_v += dot(narrow(probs, b_grad.dtype), b_grad, PRECISION)
        acc_k += dot(narrow(d_scores, b_q.dtype), b_q, PRECISION)
    return acc_k, acc_v


@triton.jit
def _grad_of_key_tile(
    i_pack, task, tile, side, kv, grad_k, grad_v, sizes, variant,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, FP32_SOFTMAX: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of the keys of a row, skipped ones included, from all queries that see them."""
    HEADS: tl.constexpr = SHAPE.pack * SHAPE.q_per_kv
    ATTEMPTS: tl.constexpr = SHAPE.pack + 1 if SHAPE.pack > 1 else 1
    retry = i_pack < 0
    for attempt in range(0, ATTEMPTS):
        if retry | (attempt == 0):
            o_c = tile * SHAPE.block_k + tl.arange(0, SHAPE.block_k)
            # `j` counts behind the skipped keys, which are below 0.
            t = o_c // SHAPE.pack
            o_h = o_c % SHAPE.pack
            j = t - sizes.skip
            keys = task.keys - sizes.skip
            tokens_here = of_attempt(task.keys, o_h, attempt, SHAPE.pack)
            m_t = t < tokens_here  # [BLOCK_K]
            m_in = (t < tl.where(task.row < sizes.rows, tokens_here, 0)) & (j >= 0)
            head = (i_pack * SHAPE.pack + o_h).to(tl.int64)
            b_k, b_v = load_key_tile(kv, task.k_first, t, head, m_in, SHAPE)
            acc_k = tl.full([SHAPE.block_k, SHAPE.block_d], 0.0, tl.float32)
            acc_v = tl.full([SHAPE.block_k, SHAPE.block_dv], 0.0, tl.float32)
            if task.row < sizes.rows:
                j_first = tile * SHAPE.block_k // SHAPE.pack - sizes.skip
                j_last = tl.minimum((tile * SHAPE.block_k + SHAPE.block_k - 1) // SHAPE.pack - sizes.skip, keys - 1)
                tiles = query_tiles(
                    j_first, j_last, task.count, keys, task.targets, variant, HEADS, SHAPE.block_q, VARIANT
                )
                seen = RowTask(task.row, task.first, task.count, task.k_first, keys, task.targets)
                acc_k, acc_v = _over_queries(
                    b_k, b_v, side, kv.rope, i_pack, attempt, j, o_h, (j_first, j_last), tiles, seen, variant,
                    SHAPE, VARIANT, FP32_SOFTMAX,
                )  # fmt: skip
            acc_k = acc_k * remaining_scale(keys, variant, VARIANT, kv.k.pointer.dtype.element_ty)
            if SHAPE.v_is_k:
                acc_k = acc_k + acc_v
            if SHAPE.pack > 1:
                bad = rows_with_nan(acc_k)
                if not SHAPE.v_is_k:
                    bad = bad | rows_with_nan(acc_v)
                retry = retry | (tl.max(bad, 0) > 0)
            acc_k = rotate_k(acc_k, kv.rope, task.k_first, t, m_in, SHAPE, True)
            # Skipped keys get zeros, even where a zero was multiplied with NaN.
            p_token = (task.k_first + t) * (SHAPE.packs * SHAPE.pack) + head
            if not SHAPE.v_is_k:
                o_v = tl.arange(0, SHAPE.block_dv)
                store_tokens(grad_v, p_token, m_t, tl.where(m_in[:, None], acc_v, 0.0), o_v, SHAPE.dv)
            o_d = columns(SHAPE.block_d, SHAPE.half, SHAPE.interleaved)
            store_tokens(grad_k, p_token, m_t, tl.where(m_in[:, None], acc_k, 0.0), o_d, SHAPE.d)


@triton.jit
def _grad_of_keys(
    i, side, kv, offsets, tile_list, grad_k, grad_v, sizes, variant,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, FP32_SOFTMAX: tl.constexpr,
):  # fmt: skip
    """dK and dV of the tile of a program, if it has one."""
    task, tile, idle = key_task(i // SHAPE.packs, offsets, tile_list, sizes, variant, SHAPE, VARIANT)
    if not idle:
        i_pack = i % SHAPE.packs
        _grad_of_key_tile(i_pack, task, tile, side, kv, grad_k, grad_v, sizes, variant, SHAPE, VARIANT, FP32_SOFTMAX)


@triton.jit(do_not_specialize=SIZES)
def attention_grad_keys(
    side, kv, offsets, tile_list, grad_k, grad_v,
    rows, q_tokens, k_tokens, queries, skip, left, right, prefix, variant_inputs,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, FP32_SOFTMAX: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, or, if PERSISTENT, of several of the list, from all queries that see them; zero on
    the tail and on skipped keys."""
    sizes = Sizes(rows, q_tokens, k_tokens, queries, skip)
    variant = Variant(VariantInputs(*variant_inputs), left, right, prefix, skip)
    side = QuerySide(side.q, side.grad, side.lse, side.delta, side.attn_out, side.grad_lse, side.sinks)
    kv = KeysAndValues(kv.k, kv.v, kv.rope)
    i = tl.program_id(0)
    count, stride = tiles_of_program(i, tile_list, SHAPE, PERSISTENT)
    for step in range(0, count, stride):
        _grad_of_keys(
            i + step, side, kv, offsets, tile_list, grad_k, grad_v, sizes, variant, SHAPE, VARIANT, FP32_SOFTMAX
        )
