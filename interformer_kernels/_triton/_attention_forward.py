"""Forward of the attention kernels: an online softmax, or a plain sum, over the keys of a row or a chunk of them."""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._attention_output import finish, keep_piece, piece
from interformer_kernels._triton._attention_tiles import (
    at,
    fold,
    key_tiles,
    load_keys,
    not_numbers,
    of_attempt,
    sees_some,
    task,
    visible,
)
from interformer_kernels._triton._maps import dot, narrow


@triton.jit(
    do_not_specialize=["rows", "q_tokens", "k_tokens", "queries", "skip", "left", "right", "prefix"],
)
def attention_forward(
    q, k, v, gate, residual, out, lse, attn_out, pieces, weights_of_pieces, q_offsets, kv_offsets,
    rows, q_tokens, k_tokens, queries, skip, left, right, prefix, scale, post_scale,
    q_row, q_token, q_head, k_token, k_head, v_token, v_head,
    gate_row, gate_token, gate_head, gate_channel, residual_row, residual_token, residual_head,
    D: tl.constexpr, DV: tl.constexpr, PACK: tl.constexpr, GROUP: tl.constexpr, PACKS: tl.constexpr,
    LAYOUT: tl.constexpr, SCORE: tl.constexpr, V_IS_K: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr,
    GATE: tl.constexpr, FORM: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    SPLIT: tl.constexpr, CELL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries over the keys that it sees.

    With SPLIT (a multiple of the keys of a tile), rows that have more keys are cut into chunks of so many, a program
    for each; `attention_merge` joins them. Shorter rows are not touched by it, bit by bit. Rows that fit a CELL are not
    done here, but in `_attention_short.py`.
    """
    HEADS: tl.constexpr = PACK * GROUP
    i_pack = tl.program_id(0) % PACKS
    slot = tl.program_id(0) // PACKS
    row, first, count, tile, k_first, keys, chunk, idle = task(
        slot, q_offsets, kv_offsets, rows, q_tokens, k_tokens, queries, skip, HEADS, BLOCK_Q, LAYOUT, SPLIT, CELL
    )
    if idle:
        return

    ATTEMPTS: tl.constexpr = PACK + 1 if PACK > 1 else 1
    again = tl.program_id(0) < 0
    for attempt in range(0, ATTEMPTS):
        if again | (attempt == 0):
            o_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
            o_d = tl.arange(0, BLOCK_D)
            n = o_q // HEADS
            cell = o_q % HEADS // GROUP
            head = (i_pack * HEADS + o_q % HEADS).to(tl.int64)
            queries_here = of_attempt(count, cell, attempt, PACK)
            m_in = n < tl.where(row < rows, queries_here, 0)  # [BLOCK_Q]
            p_q = at(row, first, n, q_row, q_token, LAYOUT) + head * q_head
            b_q = tl.load(q + p_q[:, None] + o_d, mask=m_in[:, None] & (o_d < D), other=0.0)

            largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_Q], tl.float32)
            sums = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
            n_first = tile * BLOCK_Q // HEADS
            n_last = tl.minimum((tile * BLOCK_Q + BLOCK_Q - 1) // HEADS, count - 1)
            before, start, stop = key_tiles(
                n_first, n_last, count, keys, left, right, prefix, BLOCK_K // PACK, CAUSAL, LEFT, RIGHT, PREFIX
            )
            if SPLIT:
                start = chunk * (SPLIT * PACK // BLOCK_K)
                stop = tl.minimum(stop, start + SPLIT * PACK // BLOCK_K)
            for step in range(0, before + stop - start):
                i_k = tl.where(step < before, step, start + step - before)
                j, o_h, b_k, b_v = load_keys(
                    k, v, i_pack, attempt, i_k, k_first, keys, k_token, k_head, v_token, v_head,
                    D, DV, PACK, V_IS_K, BLOCK_K, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
                m_seen = visible(n[:, None], j[None, :], count, keys, left, right, prefix, CAUSAL, LEFT, RIGHT, PREFIX)
                if PACK > 1:
                    m_seen = m_seen & (cell[:, None] == o_h[None, :])
                s = dot(b_q, tl.trans(b_k), PRECISION)
                weights, factor, largest, total = fold(
                    s, m_seen, largest, total, keys, scale, post_scale, SCORE, b_v.dtype
                )
                sums = sums * factor[:, None] + dot(narrow(weights, b_v.dtype), b_v, PRECISION)
            if PACK > 1:
                again = again | (tl.max(not_numbers(sums), 0) > 0)

            if SPLIT and keys > SPLIT:
                keep_piece(
                    sums, largest, total, pieces, weights_of_pieces, piece(k_first, chunk, SPLIT), queries,
                    queries_here, n, head, PACKS * HEADS, DV, BLOCK_DV,
                )  # fmt: skip
            else:
                some = sees_some(n, count, keys, left, right, prefix, CAUSAL, LEFT, RIGHT, PREFIX)
                finish(
                    sums, largest, total, keys, some, gate, residual, out, lse, attn_out,
                    row, rows, first, queries_here, n, head,
                    gate_row, gate_token, gate_head, gate_channel, residual_row, residual_token, residual_head,
                    PACKS * HEADS, DV, LAYOUT, SCORE, GATE, FORM, ACTIVATION, RESIDUAL, KEEP, BLOCK_DV,
                )  # fmt: skip
