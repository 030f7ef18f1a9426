# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Outputs of the attention kernels, and the partials of rows whose keys are split."""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._arguments import Epilogue, RowTask, Sizes
from interformer_kernels._triton._attention_epilogue import apply_epilogue
from interformer_kernels._triton._attention_variant import add_sink, finalize, split_alpha
from interformer_kernels._triton._maps import narrow
from interformer_kernels._triton._rows import span, split_row


@triton.jit
def store_outputs(
    acc, row_max, row_sum, any_key, task, count, n, head, rows, epilogue, outputs,
    HEADS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, LAYOUT: tl.constexpr,
    VARIANT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Finish and store the outputs of a tile of queries (those below `count`); zero on the tail.

    `any_key`: queries that are not fully masked.
    """
    out_dtype: tl.constexpr = outputs.out.dtype.element_ty
    if VARIANT.sinks:
        sink = tl.load(epilogue.sinks + head)
        acc, row_max, row_sum = add_sink(acc, row_max, row_sum, sink, task.keys, out_dtype)
    acc, b_lse = finalize(acc, row_max, row_sum, task.keys, any_key, VARIANT, out_dtype)
    if VARIANT.sinks and LAYOUT == "packed":
        b_lse = tl.where(task.row < rows, b_lse, float("-inf"))
    o_v = tl.arange(0, BLOCK_DV)
    m_q = n < count  # [BLOCK_Q]
    loaded = tl.where(task.row < rows, count, 0)
    m_out = m_q[:, None] & (o_v < DV)[None, :]  # [BLOCK_Q, BLOCK_DV]
    p_head = (task.first + n) * HEADS + head
    p_out = p_head[:, None] * DV + o_v
    if VARIANT.score == "softmax":
        tl.store(outputs.lse + p_head, b_lse, mask=m_q)
    if outputs.attn_out is not None:
        tl.store(outputs.attn_out + p_out, acc, mask=m_out)
    if epilogue.gate is not None or epilogue.residual is not None:
        m_load = (n < loaded)[:, None] & (o_v < DV)[None, :]
        b_out = apply_epilogue(acc, epilogue, task.row, task.first, n, head, m_load, o_v, LAYOUT, GATE)
        acc = tl.where(task.row < rows, b_out, 0.0) if LAYOUT == "packed" else b_out
    tl.store(outputs.out + p_out, narrow(acc, out_dtype), mask=m_out)


# ---------------------------------------------------------------- rows whose keys are split

# Splits that a program reads at once: one after another, each would wait for memory.
UNROLL = tl.constexpr(4)


@triton.jit
def partial_index(k_first, i_split, SPLIT_KV: tl.constexpr):
    """Index of the partial of a split; rows of more than SPLIT_KV keys have their partials side by side."""
    return 2 * k_first // SPLIT_KV + i_split


@triton.jit
def store_partial(
    acc, row_max, row_sum, partials, index, queries, count, n, head,
    HEADS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Store the sums of a tile of queries (those below `count`) over one split of a row's keys."""
    o_v = tl.arange(0, BLOCK_DV)
    m_q = n < count  # [BLOCK_Q]
    p = (index * queries + n) * HEADS + head
    tl.store(partials.acc + p[:, None] * DV + o_v, acc, mask=m_q[:, None] & (o_v < DV)[None, :])
    tl.store(partials.stats + 2 * p, row_max, mask=m_q)
    tl.store(partials.stats + 2 * p + 1, row_sum, mask=m_q)


@triton.jit
def _row_to_combine(
    slot, kv_offsets, split_rows, sizes, HEADS: tl.constexpr, SPLIT_KV: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Row, tile of its queries, first key and number of keys of the row whose splits a slot combines; no keys if idle.

    A slot reads its row from the list of `split_rows`, or stands for a mark, and has the row whose first mark that is.
    """
    tiles = tl.cdiv(sizes.queries * HEADS, BLOCK_Q)
    i = slot // tiles
    if split_rows is not None:
        row = tl.load(split_rows + i)
        first, count = span(kv_offsets, row, sizes.rows, sizes.k_tokens)
        keys = count - sizes.skip
    else:
        row, first, keys, is_split = split_row(i, kv_offsets, sizes.rows, sizes.k_tokens, sizes.skip, SPLIT_KV)
        keys = tl.where(is_split & (i == tl.cdiv(first, SPLIT_KV)), keys, 0)
    return row, slot % tiles, first + sizes.skip, keys


@triton.jit(do_not_specialize=["rows", "k_tokens", "queries", "skip"])
def combine_partials(
    partials, epilogue, outputs, kv_offsets, split_rows, rows, k_tokens, queries, skip,
    HEADS: tl.constexpr, DV: tl.constexpr, LAYOUT: tl.constexpr, VARIANT: tl.constexpr, GATE: tl.constexpr,
    SPLIT_KV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Combine the splits of a row, in order, and finish its outputs."""
    sizes = Sizes(rows, 0, k_tokens, queries, skip)
    epilogue = Epilogue(epilogue.sinks, epilogue.gate, epilogue.residual)
    slot = tl.program_id(0)
    row, tile, k_first, keys = _row_to_combine(slot, kv_offsets, split_rows, sizes, HEADS, SPLIT_KV, BLOCK_Q)
    if keys == 0:
        return
    o_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = o_q // HEADS
    head = (o_q % HEADS).to(tl.int64)
    o_v = tl.arange(0, BLOCK_DV)
    m_q = n < queries  # [BLOCK_Q]
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    if VARIANT.score == "softmax":
        for i_split in tl.range(0, tl.cdiv(keys, SPLIT_KV), loop_unroll_factor=UNROLL):
            p = (partial_index(k_first, i_split, SPLIT_KV) * queries + n) * HEADS + head
            row_max = tl.maximum(row_max, tl.load(partials.stats + 2 * p, mask=m_q, other=0.0))
    for i_split in tl.range(0, tl.cdiv(keys, SPLIT_KV), loop_unroll_factor=UNROLL):
        p = (partial_index(k_first, i_split, SPLIT_KV) * queries + n) * HEADS + head
        split_acc = tl.load(partials.acc + p[:, None] * DV + o_v, mask=m_q[:, None] & (o_v < DV)[None, :], other=0.0)
        if VARIANT.score == "softmax":
            split_max = tl.load(partials.stats + 2 * p, mask=m_q, other=0.0)
            split_sum = tl.load(partials.stats + 2 * p + 1, mask=m_q, other=0.0)
            alpha = split_alpha(split_max, row_max, outputs.out.dtype.element_ty)
            row_sum += split_sum * alpha
            acc += split_acc * alpha[:, None]
        else:
            acc += split_acc
    task = RowTask(row, row.to(tl.int64) * queries, queries, k_first, keys, 0)
    store_outputs(
        acc, row_max, row_sum, m_q, task, queries, n, head, rows, epilogue, outputs,
        HEADS, DV, BLOCK_DV, LAYOUT, VARIANT, GATE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "k_tokens", "queries", "skip"])
def add_partials(
    partials, out, kv_offsets, split_rows, rows, k_tokens, queries, skip,
    HEADS: tl.constexpr, C: tl.constexpr, SPLIT_KV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum over the splits of a row, in order, of `partials [P, N, H, C]` for `out [B, N, H, C]`."""
    sizes = Sizes(rows, 0, k_tokens, queries, skip)
    slot = tl.program_id(0)
    row, tile, k_first, keys = _row_to_combine(slot, kv_offsets, split_rows, sizes, HEADS, SPLIT_KV, BLOCK_Q)
    if keys == 0:
        return
    o_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_c = tl.arange(0, BLOCK_C)
    m = (o_q < queries * HEADS)[:, None] & (o_c < C)[None, :]  # [BLOCK_Q, BLOCK_C]
    acc = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
    for i_split in tl.range(0, tl.cdiv(keys, SPLIT_KV), loop_unroll_factor=UNROLL):
        p = partial_index(k_first, i_split, SPLIT_KV) * queries * HEADS + o_q
        acc += tl.load(partials + p[:, None] * C + o_c, mask=m, other=0.0)
    p_out = (row.to(tl.int64) * queries * HEADS + o_q)[:, None] * C + o_c
    tl.store(out + p_out, narrow(acc, out.dtype.element_ty), mask=m)
