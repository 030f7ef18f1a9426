"""What becomes of attention outputs: the log-sum-exp, the epilogue's gate and residual, and the sums of split rows."""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._attention_tiles import at, settle
from interformer_kernels._triton._maps import LOG2_E, activate, exp2, narrow
from interformer_kernels._triton._rows import holder


@triton.jit
def gated(
    sums, residual, gate, p_gate, p_residual, m_out, FORM: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """`residual + G(A, gate)` of a tile of attention outputs."""
    if GATE:
        b_gate = tl.load(gate + p_gate, mask=m_out, other=0.0).to(tl.float32)
        if FORM == "multiply":
            sums = sums * activate(b_gate, ACTIVATION, gate.dtype.element_ty)
        else:
            sums = activate(sums * b_gate, ACTIVATION, gate.dtype.element_ty)
    if RESIDUAL:
        sums = sums + tl.load(residual + p_residual, mask=m_out, other=0.0).to(tl.float32)
    return sums


@triton.jit
def finish(
    sums, largest, total, keys, some, gate, residual, out, lse, attn_out, row, rows, first, count, n, head,
    gate_row, gate_token, gate_head, gate_channel, residual_row, residual_token, residual_head,
    HEADS: tl.constexpr, DV: tl.constexpr, LAYOUT: tl.constexpr, SCORE: tl.constexpr, GATE: tl.constexpr,
    FORM: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Outputs of a tile of queries from the sums over all their keys; zero on the tail. `some` see any key."""
    sums, b_lse = settle(sums, largest, total, keys, some, SCORE, out.dtype.element_ty)
    o_v = tl.arange(0, BLOCK_DV)
    m_q = n < count  # [BLOCK_Q]
    held = tl.where(row < rows, count, 0)
    m_out = m_q[:, None] & (o_v < DV)[None, :]  # [BLOCK_Q, BLOCK_DV]
    p_head = (first + n) * HEADS + head
    p_out = p_head[:, None] * DV + o_v
    if SCORE == "softmax":
        tl.store(lse + p_head, b_lse, mask=m_q)
    if KEEP:
        tl.store(attn_out + p_out, sums, mask=m_out)
    if GATE or RESIDUAL:
        p_gate = at(row, first, n, gate_row, gate_token, LAYOUT) + head * gate_head
        p_residual = at(row, first, n, residual_row, residual_token, LAYOUT) + head * residual_head
        b_out = gated(
            sums, residual, gate, p_gate[:, None] + o_v.to(tl.int64) * gate_channel, p_residual[:, None] + o_v,
            (n < held)[:, None] & (o_v < DV)[None, :], FORM, ACTIVATION, GATE, RESIDUAL,
        )  # fmt: skip
        sums = tl.where(row < rows, b_out, 0.0) if LAYOUT == "packed" else b_out
    tl.store(out + p_out, narrow(sums, out.dtype.element_ty), mask=m_out)


@triton.jit
def piece(k_first, chunk, SPLIT: tl.constexpr):
    """Where the sums of a chunk of a split row lie: rows of more than SPLIT keys have room side by side."""
    return 2 * k_first // SPLIT + chunk


@triton.jit
def keep_piece(sums, largest, total, pieces, weights, at_piece, queries, count, n, head, HEADS: tl.constexpr,
               DV: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Keep the sums of a tile of queries (those below `count`) over one chunk of a row's keys."""
    o_v = tl.arange(0, BLOCK_DV)
    m_q = n < count  # [BLOCK_Q]
    p = (at_piece * queries + n) * HEADS + head
    tl.store(pieces + p[:, None] * DV + o_v, sums, mask=m_q[:, None] & (o_v < DV)[None, :])
    tl.store(weights + 2 * p, largest, mask=m_q)
    tl.store(weights + 2 * p + 1, total, mask=m_q)


@triton.jit
def split_row(
    slot, kv_offsets, rows, tokens, queries, skip, HEADS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """Row, tile of its queries, first key and number of keys of the row whose chunks a slot joins; no keys if none.

    A row of more than SPLIT keys holds a multiple of SPLIT among its tokens; its slots are those of the first of them.
    """
    tiles = tl.cdiv(queries * HEADS, BLOCK_Q)
    mark = (slot // tiles).to(tl.int64) * SPLIT
    row, first, count = holder(mark, kv_offsets, rows, tokens)
    keys = count - skip
    idle = (row >= rows) | (keys <= SPLIT) | (mark - SPLIT >= first)
    return row, slot % tiles, first + skip, tl.where(idle, 0, keys)


@triton.jit(do_not_specialize=["rows", "k_tokens", "queries", "skip"])
def attention_merge(
    pieces, weights, gate, residual, out, lse, attn_out, kv_offsets, rows, k_tokens, queries, skip,
    gate_row, gate_token, gate_head, gate_channel, residual_row, residual_token, residual_head,
    HEADS: tl.constexpr, DV: tl.constexpr, LAYOUT: tl.constexpr, SCORE: tl.constexpr, GATE: tl.constexpr,
    FORM: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Join the chunks of a split row, in order, and finish its outputs."""
    row, tile, k_first, keys = split_row(
        tl.program_id(0), kv_offsets, rows, k_tokens, queries, skip, HEADS, SPLIT, BLOCK_Q
    )
    if keys == 0:
        return
    o_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = o_q // HEADS
    head = (o_q % HEADS).to(tl.int64)
    o_v = tl.arange(0, BLOCK_DV)
    m_q = n < queries  # [BLOCK_Q]
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    sums = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    for chunk in range(0, tl.cdiv(keys, SPLIT)):
        p = (piece(k_first, chunk, SPLIT) * queries + n) * HEADS + head
        b_sums = tl.load(pieces + p[:, None] * DV + o_v, mask=m_q[:, None] & (o_v < DV)[None, :], other=0.0)
        if SCORE == "softmax":
            b_largest = tl.load(weights + 2 * p, mask=m_q, other=0.0)
            new = tl.maximum(largest, b_largest)
            base = tl.where(new == float("-inf"), 0.0, new)
            old_share = exp2((largest - base) * LOG2_E, out.dtype.element_ty)
            share = exp2((b_largest - base) * LOG2_E, out.dtype.element_ty)
            total = total * old_share + tl.load(weights + 2 * p + 1, mask=m_q, other=0.0) * share
            sums = sums * old_share[:, None] + b_sums * share[:, None]
            largest = new
        else:
            sums += b_sums
    first = row.to(tl.int64) * queries
    finish(
        sums, largest, total, keys, m_q, gate, residual, out, lse, attn_out, row, rows, first, queries, n, head,
        gate_row, gate_token, gate_head, gate_channel, residual_row, residual_token, residual_head,
        HEADS, DV, LAYOUT, SCORE, GATE, FORM, ACTIVATION, RESIDUAL, KEEP, BLOCK_DV,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "k_tokens", "queries", "skip"])
def add_pieces(
    pieces, out, kv_offsets, rows, k_tokens, queries, skip,
    HEADS: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum over the chunks of a split row, in order, of `pieces [P, N, H, C]` for `out [B, N, H, C]`."""
    row, tile, k_first, keys = split_row(
        tl.program_id(0), kv_offsets, rows, k_tokens, queries, skip, HEADS, SPLIT, BLOCK_Q
    )
    if keys == 0:
        return
    o_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_c = tl.arange(0, BLOCK_C)
    m = (o_q < queries * HEADS)[:, None] & (o_c < C)[None, :]  # [BLOCK_Q, BLOCK_C]
    sums = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
    for chunk in range(0, tl.cdiv(keys, SPLIT)):
        p = piece(k_first, chunk, SPLIT) * queries * HEADS + o_q
        sums += tl.load(pieces + p[:, None] * C + o_c, mask=m, other=0.0)
    p_out = (row.to(tl.int64) * queries * HEADS + o_q)[:, None] * C + o_c
    tl.store(out + p_out, narrow(sums, out.dtype.element_ty), mask=m)
