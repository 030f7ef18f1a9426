# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Backward of the attention kernels behind the epilogue: dQ here, dK with dV in `_attention_grad_keys.py`.

With the probabilities P = softmax(S) or act(S), dA the gradient of P V, and dP = dA V':

    dS = P * (dP - delta + dlse), delta = sum of dA * A over channels      (softmax; else act'(S) * dP)
    dQ = scale dS K,   dK = scale dS' Q,   dV = P' dA

The rounding of a log-sum-exp is an error of all probabilities of its query, and the products in delta do not cancel
against those in dP bit by bit. In float32 (`fp32_softmax`) both matter, so a pass before the others sums up P, by which
probabilities are then divided, and P * dP, whose quotient is delta. In 16 bits delta comes from A as it was in float32
and from the rounded dA that is multiplied in dP, so they cancel as far as float32 goes; there the pass sums up only
for queries whose scores are so large that the log-sum-exp has lost digits (`only_large_lse`), and makes others' delta,
unless the epilogue's backward reads A anyway. The gradient dlse of the log-sum-exp, where it is asked, is taken from
delta as that is read. Numbers that are not finite stay in their row and head by
`_attention_tiles.of_attempt`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._arguments import KeysAndValues, QuerySide, RowTask, Sizes
from interformer_kernels._triton._attention_dropout import kept_weights
from interformer_kernels._triton._attention_epilogue import (
    finish_query_stats,
    load_query_stats,
    load_raw_stats,
    store_delta,
    store_stats,
    sums_to_stats,
)
from interformer_kernels._triton._attention_masks import Pairs, key_tiles, number_of_tiles, tile_has_edge, tile_of_step
from interformer_kernels._triton._attention_output import partial_index
from interformer_kernels._triton._attention_scores import Variant, VariantInputs
from interformer_kernels._triton._attention_tiles import (
    keys_of,
    load_keys,
    load_q,
    load_queries,
    of_attempt,
    packed_rows,
    query_task,
    rows_with_nan,
    tiles_of_program,
    tokens_of_tile,
)
from interformer_kernels._triton._attention_variant import is_large, query_stats, remaining_scale, scores_to_probs
from interformer_kernels._triton._maps import dot, narrow
from interformer_kernels._triton._rope import columns, rotate_q

SIZES = ["rows", "q_tokens", "k_tokens", "queries", "skip", "left", "right", "prefix", "rows_of_group", "key_shards"]

# ---------------------------------------------------------------- passes over queries


@triton.jit
def _over_keys(
    b_q, b_grad, stats, kv, i_pack, attempt, n, cell, head, tokens, task, i_shard, tiles_of_shard, variant,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries from the keys of a row, or a shard of them, but for `remaining_scale`; or else the
    sums of P and of P * dP."""
    PRECISION: tl.constexpr = SHAPE.precision
    acc = tl.full([SHAPE.block_q, SHAPE.block_d], 0.0, tl.float32)
    row_sum = tl.full([SHAPE.block_q], 0.0, tl.float32)
    mean = tl.full([SHAPE.block_q], 0.0, tl.float32)
    TOKENS: tl.constexpr = SHAPE.block_k // SHAPE.pack
    before, start, stop, own, own_stop = key_tiles(
        tokens[0], tokens[1], task.count, task.keys, task.targets, variant, TOKENS, VARIANT
    )
    if SHAPE.layout != "packed":
        start = i_shard * tiles_of_shard
        stop = tl.maximum(tl.minimum(stop, start + tiles_of_shard), start)
        own_stop = stop
    tiles = (before, start, stop, own, own_stop)
    for step in range(0, number_of_tiles(tiles, VARIANT)):
        i_k = tl.minimum(tile_of_step(step, tiles, VARIANT), own_stop - 1)
        j, o_h, b_k, b_v = load_keys(kv, i_pack, attempt, i_k, task, SHAPE)
        if SHAPE.pack == 1:
            edge = tile_has_edge(i_k, tokens, task, variant, TOKENS, VARIANT)
            pairs = Pairs(n[:, None], j[None, :], head[:, None], task, edge, None)
        else:
            cells = cell[:, None] == o_h[None, :]
            pairs = Pairs(n[:, None], j[None, :], head[:, None], task, True, cells)
        products = dot(b_q, tl.trans(b_k), PRECISION)
        d_probs = dot(b_grad, tl.trans(b_v), PRECISION)
        if VARIANT.dropout != "":
            d_probs = d_probs * kept_weights(pairs, variant, VARIANT)
        probs, d_scores = scores_to_probs(products, d_probs, pairs, stats, variant, VARIANT, b_k.dtype, True)
        if GRADIENT:
            acc += dot(narrow(d_scores, b_k.dtype), b_k, PRECISION)
        else:
            row_sum += tl.sum(probs, 1)
            mean += tl.sum(probs * d_probs, 1)
    return acc, row_sum, mean


@triton.jit
def _make_stats(
    b_q, b_grad, side, kv, i_pack, n, cell, head, p_head, tile, m_in, task, variant,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """`load_query_stats` of a tile of queries that have none yet, or only delta, and store them for the pass over
    keys."""
    DTYPE: tl.constexpr = kv.k.pointer.dtype.element_ty
    lse, row_sum, delta = load_raw_stats(side, b_grad, p_head, m_in, SHAPE, PASS)
    needed = m_in
    if PASS.only_large_lse:
        needed = m_in & is_large(lse)
    if tl.max(needed.to(tl.int32), 0) > 0:
        # A log-sum-exp of -inf stays: it makes delta NaN where all scores are -inf.
        stats = query_stats(lse, row_sum, row_sum, variant, VARIANT, DTYPE, True)
        _, sums, mean = _over_keys(
            b_q, b_grad, stats, kv, i_pack, 0, n, cell, head, tokens_of_tile(tile, task.count, SHAPE), task, 0, 0,
            variant, SHAPE, VARIANT, False,
        )  # fmt: skip
        sums, mean = sums_to_stats(side, head, lse, sums, mean, PASS.fp32_softmax)
        row_sum = tl.where(needed, sums, row_sum)
        delta = tl.where(needed, mean, delta)
    store_stats(side.delta, p_head, n < task.count, row_sum, delta)
    return finish_query_stats(side, p_head, head, m_in, task.keys, lse, row_sum, delta, PASS.fp32_softmax)


@triton.jit
def _over_rows(
    side, kv, offsets, i_pack, attempt, n, cell, head, tile, count, task, i_shard, group, sizes, variant, key_shards,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, PASS: tl.constexpr, SPLIT_KV: tl.constexpr,
):  # fmt: skip
    """`_over_keys` of a row, or the sum of it over a group of rows that share their queries."""
    LAYOUT: tl.constexpr = SHAPE.layout
    HEADS: tl.constexpr = SHAPE.packs * SHAPE.pack * SHAPE.q_per_kv
    acc = tl.full([SHAPE.block_q, SHAPE.block_d], 0.0, tl.float32)
    row_sum = tl.full([SHAPE.block_q], 0.0, tl.float32)
    mean = tl.full([SHAPE.block_q], 0.0, tl.float32)
    begin, end = group
    out_first = task.first
    k_first = task.k_first
    keys = task.keys
    for i in range(0, end - begin):
        row = begin + i
        if SHAPE.layout == "shared" and PASS.gradient:
            out_first = row.to(tl.int64) * sizes.queries
            k_first, keys = keys_of(row, offsets, sizes)
        m_in = n < tl.where(row < sizes.rows, count, 0)  # [BLOCK_Q]
        b_q = load_q(side.q, kv.rope, row, task.first, n, head, m_in, SHAPE)
        b_grad = load_queries(side.grad, row, task.first, n, head, m_in, SHAPE.dv, SHAPE.block_dv, LAYOUT)
        p_head = (out_first + n) * HEADS + head
        if PASS.with_stats:
            b_lse, b_sum, b_delta = _make_stats(
                b_q, b_grad, side, kv, i_pack, n, cell, head, p_head, tile, m_in, task, variant, SHAPE, VARIANT, PASS
            )
        else:
            b_lse, b_sum, b_delta = load_query_stats(
                side, p_head, head, m_in, keys, VARIANT, PASS.fp32_softmax, PASS.gradient
            )
        stats = query_stats(b_lse, b_sum, b_delta, variant, VARIANT, kv.k.pointer.dtype.element_ty, True)
        tiles_of_shard = tl.cdiv(keys * SHAPE.pack, SHAPE.block_k)
        if SPLIT_KV:
            tiles_of_shard = tl.where(i_shard < 0, tiles_of_shard, SPLIT_KV * SHAPE.pack // SHAPE.block_k)
        else:
            tiles_of_shard = tl.cdiv(tiles_of_shard, key_shards)
        row_acc, row_sum, mean = _over_keys(
            b_q, b_grad, stats, kv, i_pack, attempt, n, cell, head, tokens_of_tile(tile, task.count, SHAPE),
            RowTask(row, out_first, task.count, k_first, keys, task.targets), tl.maximum(i_shard, 0), tiles_of_shard,
            variant, SHAPE, VARIANT, PASS.gradient,
        )  # fmt: skip
        if PASS.fp32_softmax:
            row_acc = row_acc * tl.div_rn(1.0, b_sum)[:, None]
        acc += row_acc * remaining_scale(keys, variant, VARIANT, kv.k.pointer.dtype.element_ty)
    return acc, row_sum, mean


@triton.jit
def _store_queries(to, p_head, m_q, acc, row_sum, mean, side, p_stats, head, SHAPE: tl.constexpr, PASS: tl.constexpr):
    """Store the gradients of a tile of queries, or the statistics that `load_query_stats` reads (for `fp32_softmax`
    sums, which splits have, too)."""
    if PASS.gradient:
        o_d = columns(SHAPE.block_d, SHAPE.half, SHAPE.interleaved)
        p = p_head[:, None] * SHAPE.d + o_d
        tl.store(to + p, narrow(acc, to.dtype.element_ty), mask=m_q[:, None] & (o_d < SHAPE.d))
    else:
        lse = row_sum
        if side.sinks is not None:
            lse = tl.load(side.lse + p_stats, mask=m_q, other=0.0)
        row_sum, mean = sums_to_stats(side, head, lse, row_sum, mean, PASS.fp32_softmax)
        store_stats(to, p_head, m_q, row_sum, mean)


@triton.jit
def _grad_of_query_tile(
    i_pack, task, tile, i_shard, group, side, kv, offsets, out, partials, sizes, variant, key_shards,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, PASS: tl.constexpr, SPLIT_KV: tl.constexpr,
):  # fmt: skip
    """The pass over one tile of queries, from the keys of a row or of a group of rows, or from a shard of them."""
    HEADS: tl.constexpr = SHAPE.pack * SHAPE.q_per_kv
    ATTEMPTS: tl.constexpr = SHAPE.pack + 1 if SHAPE.pack > 1 else 1
    retry = i_pack < 0
    for attempt in range(0, ATTEMPTS):
        if retry | (attempt == 0):
            n, cell, head = packed_rows(tile, i_pack, SHAPE)
            count = of_attempt(task.count, cell, attempt, SHAPE.pack)
            acc, row_sum, mean = _over_rows(
                side, kv, offsets, i_pack, attempt, n, cell, head, tile, count, task, i_shard, group, sizes,
                variant, key_shards, SHAPE, VARIANT, PASS, SPLIT_KV,
            )  # fmt: skip
            if SHAPE.pack > 1:
                retry = retry | (tl.max(rows_with_nan(acc) | (mean != mean).to(tl.int32), 0) > 0)
            if PASS.gradient:
                acc = rotate_q(acc, kv.rope, task.first, n, n < tl.where(task.row < sizes.rows, count, 0), SHAPE, True)
            p_head = (task.first + n) * (SHAPE.packs * HEADS) + head
            m_q = n < count  # [BLOCK_Q]
            if PASS.only_large_lse and not PASS.gradient:
                m_q = m_q & is_large(tl.load(side.lse + p_head, mask=m_q, other=0.0))
            if SPLIT_KV and i_shard >= 0:
                p = (partial_index(task.k_first, i_shard, SPLIT_KV) * sizes.queries + n) * (SHAPE.packs * HEADS) + head
                _store_queries(partials, p, m_q, acc, row_sum, mean, side, p_head, head, SHAPE, PASS)
            else:
                _store_queries(out, p_head, m_q, acc, row_sum, mean, side, p_head, head, SHAPE, PASS)


@triton.jit
def _grad_of_queries(
    i, side, kv, offsets, tile_list, out, partials, sizes, variant, rows_of_group, key_shards,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, PASS: tl.constexpr, SPLIT_KV: tl.constexpr,
):  # fmt: skip
    """The pass over the tile of a program, if it has one."""
    i_pack = i % SHAPE.packs
    task, tile, i_shard, idle = query_task(
        i // SHAPE.packs, offsets, tile_list, sizes, variant, SHAPE, VARIANT, SPLIT_KV
    )
    begin = task.row
    end = task.row + 1
    if SHAPE.layout == "shared" and PASS.gradient:
        i_shard = task.row % key_shards
        begin = task.row // key_shards * rows_of_group
        end = tl.minimum(begin + rows_of_group, sizes.rows)
    if PASS.only_large_lse and not PASS.gradient and not idle:
        idle = store_delta(side, out, tile, i_pack, task, sizes.rows, SHAPE)
    if PASS.with_stats and idle and tile_list is None:
        # Short rows need no statistics. But where offsets are in disorder, the pass over keys may read some of theirs.
        n, _, head = packed_rows(tile, i_pack, SHAPE)
        p_head = (task.first + n) * (SHAPE.packs * SHAPE.pack * SHAPE.q_per_kv) + head
        store_stats(side.delta, p_head, n < task.count, (p_head * 0).to(tl.float32), (p_head * 0).to(tl.float32))
    if not idle:
        _grad_of_query_tile(
            i_pack, task, tile, i_shard, (begin, end), side, kv, offsets, out, partials, sizes, variant, key_shards,
            SHAPE, VARIANT, PASS, SPLIT_KV,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def attention_grad_queries(
    side, kv, offsets, tile_list, out, partials,
    rows, q_tokens, k_tokens, queries, skip, left, right, prefix, rows_of_group, key_shards, variant_inputs,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, PASS: tl.constexpr, SPLIT_KV: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """A backward pass over one tile of queries, or, if PERSISTENT, over several of the list: dQ, or statistics of the
    queries, see `GradPass`.

    With SPLIT_KV, a program takes a split of the keys, and `add_partials` adds those of longer rows. Gradients of
    shared queries are sums over a group of rows; each of `key_shards` programs takes its shard of every row's keys.
    `i_shard` is the index of either.
    """
    sizes = Sizes(rows, q_tokens, k_tokens, queries, skip)
    variant = Variant(VariantInputs(*variant_inputs), left, right, prefix, skip)
    side = QuerySide(side.q, side.grad, side.lse, side.delta, side.attn_out, side.grad_lse, side.sinks)
    kv = KeysAndValues(kv.k, kv.v, kv.rope)
    i = tl.program_id(0)
    count, stride = tiles_of_program(i, tile_list, SHAPE, PERSISTENT)
    for step in range(0, count, stride):
        _grad_of_queries(
            i + step, side, kv, offsets, tile_list, out, partials, sizes, variant, rows_of_group, key_shards,
            SHAPE, VARIANT, PASS, SPLIT_KV,
        )  # fmt: skip
