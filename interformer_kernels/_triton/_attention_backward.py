"""Backward of the attention kernels: what flows back through the epilogue, then dQ, and dK with dV.

With the weights P = softmax(S) or act(S), dA the gradient of A times post_scale, and dP = dA V':

    dS = P * (dP - delta), delta = sum of dA * A over channels      (softmax; else act'(S) * dP)
    dQ = scale dS K,   dK = scale dS' Q,   dV = P' dA

The rounding of a log-sum-exp is an error of all weights of its query, and the products in delta do not cancel against
those in dP bit by bit. In float32 (`EXACT`) that counts, and a pass before the others sums up P, for weights to be
divided by it, and P * dP, whose quotient is delta. In 16 bits delta comes from A as it was in float32 and from the
rounded dA that is multiplied in dP, so they cancel as far as float32 goes; there the pass goes over the queries alone
whose scores are so large that the log-sum-exp has lost digits (`ROUGH`). What is not finite stays in its row and head
by `_attention_tiles.of_attempt`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._attention_output import piece
from interformer_kernels._triton._attention_tiles import (
    at,
    is_short,
    key_tiles,
    keys_of,
    load_keys,
    not_numbers,
    of_attempt,
    queries_of,
    query_tiles,
    rest_of_scale,
    task,
    visible,
    weigh,
)
from interformer_kernels._triton._maps import activate, dot, narrow, slope
from interformer_kernels._triton._rows import edge, find

SIZES = ["rows", "q_tokens", "k_tokens", "queries", "skip", "left", "right", "prefix", "rows_of_run", "parts"]


@triton.jit(do_not_specialize=["rows", "q_tokens", "queries"])
def epilogue_backward(
    grad_out, attn_out, gate, grad_attn_out, delta, grad_gate, q_offsets,
    rows, q_tokens, queries, grad_row, grad_token, grad_head, gate_row, gate_token, gate_head, gate_channel,
    HEADS: tl.constexpr, DV: tl.constexpr, LAYOUT: tl.constexpr, SOFTMAX: tl.constexpr, GATE: tl.constexpr,
    FORM: tl.constexpr, ACTIVATION: tl.constexpr, SUM_TOKENS: tl.constexpr, SUM_CHANNELS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Gradients of A and of the gate, and delta, of a block of query tokens under one head.

    `grad_gate` holds sums over the channels, or over the block's tokens, where the gate broadcasts along them.
    """
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    block = tl.program_id(0) // HEADS
    t = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_v = tl.arange(0, BLOCK_DV)
    if LAYOUT == "packed":
        row = block * 0
        n = t
        m_in = t < edge(q_offsets, rows, q_tokens)  # [BLOCK_T]
    else:
        row = (t // queries)[:, None]
        n = t % queries
        m_in = t < q_tokens
    m_out = (t < q_tokens)[:, None] & (o_v < DV)[None, :]  # [BLOCK_T, BLOCK_DV]
    m_load = m_out & m_in[:, None]
    p_out = (t[:, None] * HEADS + head) * DV + o_v
    p_grad = row * grad_row + n[:, None] * grad_token + head * grad_head + o_v
    b_grad = tl.load(grad_out + p_grad, mask=m_load, other=0.0).to(tl.float32)
    b_a = tl.load(attn_out + p_out, mask=m_load, other=0.0)
    if GATE:
        DTYPE: tl.constexpr = gate.dtype.element_ty
        p_gate = row * gate_row + n[:, None] * gate_token + head * gate_head + o_v.to(tl.int64) * gate_channel
        b_gate = tl.load(gate + p_gate, mask=m_load, other=0.0).to(tl.float32)
        if FORM == "multiply":
            b_grad_gate = b_grad * b_a * slope(b_gate, ACTIVATION, DTYPE)
            b_grad = b_grad * activate(b_gate, ACTIVATION, DTYPE)
        else:
            b_inner = b_grad * slope(b_a * b_gate, ACTIVATION, DTYPE)
            b_grad_gate = b_inner * b_a
            b_grad = b_inner * b_gate
        b_grad = narrow(b_grad, grad_attn_out.dtype.element_ty)
        tl.store(grad_attn_out + p_out, b_grad, mask=m_out)
        b_grad = b_grad.to(tl.float32)
        if SUM_TOKENS and SUM_CHANNELS:
            tl.store(grad_gate + block.to(tl.int64) * HEADS + head, tl.sum(tl.sum(b_grad_gate, 1), 0))
        elif SUM_TOKENS:
            p_sum = (block.to(tl.int64) * HEADS + head) * DV + o_v
            tl.store(grad_gate + p_sum, tl.sum(b_grad_gate, 0), mask=o_v < DV)
        elif SUM_CHANNELS:
            tl.store(grad_gate + t * HEADS + head, tl.sum(b_grad_gate, 1), mask=t < q_tokens)
        else:
            tl.store(grad_gate + p_out, narrow(b_grad_gate, grad_gate.dtype.element_ty), mask=m_out)
    if SOFTMAX:
        p_pair = 2 * (t * HEADS + head)
        tl.store(delta + p_pair, tl.zeros([BLOCK_T], tl.float32), mask=t < q_tokens)
        tl.store(delta + p_pair + 1, tl.sum(b_grad * b_a, 1), mask=t < q_tokens)


@triton.jit
def _over_keys(
    b_q, b_grad, b_lse, b_total, b_delta, k, v, i_pack, attempt, n, cell, n_first, n_last, count, k_first, keys, part,
    tiles_of_part, left, right, prefix, scale, k_token, k_head, v_token, v_head,
    D: tl.constexpr, DV: tl.constexpr, PACK: tl.constexpr, LAYOUT: tl.constexpr,
    SCORE: tl.constexpr, V_IS_K: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries from (a part of) the keys of one row, but for `rest_of_scale`; or else the sums of
    P and of P * dP."""
    sums = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mean = tl.zeros([BLOCK_Q], tl.float32)
    before, start, stop = key_tiles(
        n_first, n_last, count, keys, left, right, prefix, BLOCK_K // PACK, CAUSAL, LEFT, RIGHT, PREFIX
    )
    if LAYOUT != "packed":
        start = part * tiles_of_part
        stop = tl.maximum(tl.minimum(stop, start + tiles_of_part), start)
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
        grad = dot(b_grad, tl.trans(b_v), PRECISION)
        weights, grads = weigh(
            s, grad, m_seen, b_lse[:, None], b_total[:, None], b_delta[:, None], scale, SCORE, b_k.dtype
        )
        if GRADIENT:
            sums += dot(narrow(grads, b_k.dtype), b_k, PRECISION)
        else:
            total += tl.sum(weights, 1)
            mean += tl.sum(tl.where(m_seen, weights * grad, 0.0), 1)
    return sums, total, mean


@triton.jit
def _softmax_of(lse, delta, p_head, m_q, SCORE: tl.constexpr, EXACT: tl.constexpr, DELTA: tl.constexpr):
    """Of queries: log-sum-exp, sum of the weights by it (if not EXACT its log2), and delta, both where known."""
    b_lse = (p_head * 0).to(tl.float32)
    b_delta = b_lse
    total = b_lse + 1.0 if EXACT else b_lse
    if SCORE == "softmax":
        b_lse = tl.load(lse + p_head, mask=m_q, other=0.0)
        if DELTA:
            total = tl.load(delta + 2 * p_head, mask=m_q, other=0.0)
            b_delta = tl.load(delta + 2 * p_head + 1, mask=m_q, other=0.0)
            if EXACT:
                total = tl.where(total == 0.0, 1.0, total)
                b_delta = tl.div_rn(b_delta, total)
            # -inf: nothing was seen (delta is 0), or nothing but scores of -inf (delta is NaN). Disordered offsets may
            # show such a query finite scores after all.
            b_lse = tl.where(b_lse == float("-inf"), b_delta * 0.0, b_lse)
    return b_lse, total, b_delta


@triton.jit
def _is_rough(lse):
    """Whether the rounding of a log-sum-exp shows in weights of 16 bits."""
    return (tl.abs(lse) >= 1024.0) & (tl.abs(lse) < float("inf"))


@triton.jit
def _keep(
    to, p_head, m_q, sums, total, mean, D: tl.constexpr, BLOCK_D: tl.constexpr, EXACT: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a tile of queries, or what `_softmax_of` reads (if EXACT sums, which chunks have, too)."""
    if GRADIENT:
        o_d = tl.arange(0, BLOCK_D)
        p = p_head[:, None] * D + o_d
        tl.store(to + p, narrow(sums, to.dtype.element_ty), mask=m_q[:, None] & (o_d < D))
    else:
        if not EXACT:
            mean = mean / tl.where(total == 0.0, 1.0, total)
            total = tl.log2(tl.where(total == 0.0, 1.0, total))
        tl.store(to + 2 * p_head, total, mask=m_q)
        tl.store(to + 2 * p_head + 1, mean, mask=m_q)


@triton.jit(do_not_specialize=SIZES)
def attention_grad_queries(
    q, k, v, grad_attn_out, lse, delta, out, pieces, q_offsets, kv_offsets,
    rows, q_tokens, k_tokens, queries, skip, left, right, prefix, rows_of_run, parts, scale,
    q_row, q_token, q_head, k_token, k_head, v_token, v_head, grad_row, grad_token, grad_head,
    D: tl.constexpr, DV: tl.constexpr, PACK: tl.constexpr, GROUP: tl.constexpr, PACKS: tl.constexpr,
    LAYOUT: tl.constexpr, SCORE: tl.constexpr, V_IS_K: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, CELL: tl.constexpr, GRADIENT: tl.constexpr, ROUGH: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries; or else, not GRADIENT, the sums of P and of P * dP, side by side; if ROUGH, just of
    queries whose log-sum-exp is.

    With SPLIT, a program takes a chunk of the keys, and `add_pieces` adds what rows of several chunks get. Gradients of
    shared queries are sums over a run of rows, of each of which one of `parts` programs takes its part of the keys.
    """
    HEADS: tl.constexpr = PACK * GROUP
    i_pack = tl.program_id(0) % PACKS
    slot = tl.program_id(0) // PACKS
    row, first, count, tile, k_first, keys, part, idle = task(
        slot, q_offsets, kv_offsets, rows, q_tokens, k_tokens, queries, skip, HEADS, BLOCK_Q, LAYOUT, SPLIT, CELL
    )
    if idle:
        return
    n_first = tile * BLOCK_Q // HEADS
    n_last = tl.minimum((tile * BLOCK_Q + BLOCK_Q - 1) // HEADS, count - 1)
    begin = row
    end = row + 1
    if LAYOUT == "shared" and GRADIENT:
        part = row % parts
        begin = row // parts * rows_of_run
        end = tl.minimum(begin + rows_of_run, rows)
    if ROUGH:
        o_all = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        p_all = (first + o_all // HEADS) * (PACKS * HEADS) + i_pack * HEADS + o_all % HEADS
        b_all = tl.load(lse + p_all, mask=o_all // HEADS < count, other=0.0)
        if tl.max(_is_rough(b_all).to(tl.int32), 0) == 0:
            return
    ATTEMPTS: tl.constexpr = PACK + 1 if PACK > 1 else 1
    again = tl.program_id(0) < 0
    for attempt in range(0, ATTEMPTS):
        if again | (attempt == 0):
            o_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
            o_d = tl.arange(0, BLOCK_D)
            o_v = tl.arange(0, BLOCK_DV)
            n = o_q // HEADS
            cell = o_q % HEADS // GROUP
            head = (i_pack * HEADS + o_q % HEADS).to(tl.int64)
            queries_here = of_attempt(count, cell, attempt, PACK)
            sums = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
            total = tl.zeros([BLOCK_Q], tl.float32)
            mean = tl.zeros([BLOCK_Q], tl.float32)
            for i in range(0, end - begin):
                b = begin + i
                out_first = first
                if LAYOUT == "shared" and GRADIENT:
                    out_first = b.to(tl.int64) * queries
                    k_first, keys = keys_of(b, rows, kv_offsets, k_tokens, skip)
                m_in = n < tl.where(b < rows, queries_here, 0)  # [BLOCK_Q]
                p_q = at(b, first, n, q_row, q_token, LAYOUT) + head * q_head
                p_grad = at(b, first, n, grad_row, grad_token, LAYOUT) + head * grad_head
                b_q = tl.load(q + p_q[:, None] + o_d, mask=m_in[:, None] & (o_d < D), other=0.0)
                b_grad = tl.load(grad_attn_out + p_grad[:, None] + o_v, mask=m_in[:, None] & (o_v < DV), other=0.0)
                b_lse, b_total, b_delta = _softmax_of(
                    lse, delta, (out_first + n) * (PACKS * HEADS) + head, m_in, SCORE, EXACT, GRADIENT
                )
                tiles_of_part = SPLIT * PACK // BLOCK_K if SPLIT else tl.cdiv(tl.cdiv(keys * PACK, BLOCK_K), parts)
                row_sums, total, mean = _over_keys(
                    b_q, b_grad, b_lse, b_total, b_delta, k, v, i_pack, attempt, n, cell, n_first, n_last,
                    count, k_first, keys, part, tiles_of_part, left, right, prefix, scale,
                    k_token, k_head, v_token, v_head,
                    D, DV, PACK, LAYOUT, SCORE, V_IS_K, CAUSAL, LEFT, RIGHT, PREFIX,
                    BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_DV, PRECISION, GRADIENT,
                )  # fmt: skip
                if EXACT:
                    row_sums = row_sums * tl.div_rn(1.0, b_total)[:, None]
                sums += row_sums * rest_of_scale(scale, keys, SCORE, k.dtype.element_ty)
            if PACK > 1:
                again = again | (tl.max(not_numbers(sums) | (mean != mean).to(tl.int32), 0) > 0)
            m_q = n < queries_here  # [BLOCK_Q]
            if ROUGH:
                p_lse = lse + (first + n) * (PACKS * HEADS) + head
                m_q = m_q & _is_rough(tl.load(p_lse, mask=m_q, other=0.0))
            if SPLIT and keys > SPLIT:
                p_piece = (piece(k_first, part, SPLIT) * queries + n) * (PACKS * HEADS) + head
                _keep(pieces, p_piece, m_q, sums, total, mean, D, BLOCK_D, EXACT, GRADIENT)
            else:
                _keep(out, (first + n) * (PACKS * HEADS) + head, m_q, sums, total, mean, D, BLOCK_D, EXACT, GRADIENT)


@triton.jit(do_not_specialize=SIZES)
def attention_grad_keys(
    q, k, v, grad_attn_out, lse, delta, grad_k, grad_v, q_offsets, kv_offsets,
    rows, q_tokens, k_tokens, queries, skip, left, right, prefix, scale,
    q_row, q_token, q_head, k_token, k_head, v_token, v_head, grad_row, grad_token, grad_head,
    D: tl.constexpr, DV: tl.constexpr, PACK: tl.constexpr, GROUP: tl.constexpr, PACKS: tl.constexpr,
    LAYOUT: tl.constexpr, SCORE: tl.constexpr, V_IS_K: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, from all queries that see them; zero on the tail and on skipped keys."""
    HEADS: tl.constexpr = PACK * GROUP
    i_pack = tl.program_id(0) % PACKS
    slot = tl.program_id(0) // PACKS
    row, k_first, tokens, tile = find(slot, kv_offsets, rows, k_tokens, PACK, BLOCK_K)
    if tile * BLOCK_K >= tokens * PACK:
        return
    first, count = queries_of(row, rows, q_tokens, q_offsets, queries, LAYOUT)
    if CELL and is_short(kv_offsets, row, rows, k_tokens, k_first, tokens, count, CELL):
        return
    ATTEMPTS: tl.constexpr = PACK + 1 if PACK > 1 else 1
    again = tl.program_id(0) < 0
    for attempt in range(0, ATTEMPTS):
        if again | (attempt == 0):
            o_c = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            o_r = tl.arange(0, BLOCK_Q)
            o_d = tl.arange(0, BLOCK_D)
            o_v = tl.arange(0, BLOCK_DV)
            # `j` counts behind the skipped keys, which are below 0.
            t = o_c // PACK
            j = t - skip
            keys = tokens - skip
            tokens_here = of_attempt(tokens, o_c % PACK, attempt, PACK)
            m_t = t < tokens_here  # [BLOCK_K]
            m_in = (t < tl.where(row < rows, tokens_here, 0)) & (j >= 0)
            k_head_of = (i_pack * PACK + o_c % PACK).to(tl.int64)
            p_k = (k_first + t) * k_token + k_head_of * k_head
            b_k = tl.load(k + p_k[:, None] + o_d, mask=m_in[:, None] & (o_d < D), other=0.0)
            if V_IS_K:
                b_v = b_k
            else:
                p_v = (k_first + t) * v_token + k_head_of * v_head
                b_v = tl.load(v + p_v[:, None] + o_v, mask=m_in[:, None] & (o_v < DV), other=0.0)
            sums_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
            sums_v = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
            if row < rows:
                j_first = tile * BLOCK_K // PACK - skip
                j_last = tl.minimum((tile * BLOCK_K + BLOCK_K - 1) // PACK - skip, keys - 1)
                before, start, stop = query_tiles(
                    j_first, j_last, count, keys, left, right, prefix, HEADS, BLOCK_Q, CAUSAL, LEFT, RIGHT, PREFIX
                )
                for step in range(0, before + stop - start):
                    i_q = tl.where(step < before, step, start + step - before)
                    o_q = i_q * BLOCK_Q + o_r
                    n = o_q // HEADS
                    cell = o_q % HEADS // GROUP
                    head = (i_pack * HEADS + o_q % HEADS).to(tl.int64)
                    m_q = n < of_attempt(count, cell, attempt, PACK)  # [BLOCK_Q]
                    p_q = at(row, first, n, q_row, q_token, LAYOUT) + head * q_head
                    p_grad = at(row, first, n, grad_row, grad_token, LAYOUT) + head * grad_head
                    b_q = tl.load(q + p_q[:, None] + o_d, mask=m_q[:, None] & (o_d < D), other=0.0)
                    b_grad = tl.load(grad_attn_out + p_grad[:, None] + o_v, mask=m_q[:, None] & (o_v < DV), other=0.0)
                    b_lse, b_total, b_delta = _softmax_of(
                        lse, delta, (first + n) * (PACKS * HEADS) + head, m_q, SCORE, EXACT, True
                    )
                    m_seen = visible(
                        n[None, :], j[:, None], count, keys, left, right, prefix, CAUSAL, LEFT, RIGHT, PREFIX
                    )
                    m_seen = m_seen & (j >= 0)[:, None]  # [BLOCK_K, BLOCK_Q]
                    if PACK > 1:
                        m_seen = m_seen & (cell[None, :] == (o_c % PACK)[:, None])
                    s = dot(b_k, tl.trans(b_q), PRECISION)
                    grad = dot(b_v, tl.trans(b_grad), PRECISION)
                    weights, grads = weigh(
                        s, grad, m_seen, b_lse[None, :], b_total[None, :], b_delta[None, :], scale, SCORE, b_k.dtype
                    )
                    if EXACT:
                        b_share = tl.div_rn(1.0, b_total)[None, :]
                        weights = weights * b_share
                        grads = grads * b_share
                    sums_v += dot(narrow(weights, b_grad.dtype), b_grad, PRECISION)
                    sums_k += dot(narrow(grads, b_q.dtype), b_q, PRECISION)
            sums_k = sums_k * rest_of_scale(scale, keys, SCORE, k.dtype.element_ty)
            if V_IS_K:
                sums_k = sums_k + sums_v
            if PACK > 1:
                bad = not_numbers(sums_k)
                if not V_IS_K:
                    bad = bad | not_numbers(sums_v)
                again = again | (tl.max(bad, 0) > 0)
            # Skipped keys had no part in it, not even in a zero times NaN.
            sums_k = tl.where(m_in[:, None], sums_k, 0.0)
            p_token = (k_first + t) * (PACKS * PACK) + k_head_of
            if not V_IS_K:
                sums_v = tl.where(m_in[:, None], sums_v, 0.0)
                p_v = p_token[:, None] * DV + o_v
                tl.store(grad_v + p_v, narrow(sums_v, grad_v.dtype.element_ty), mask=m_t[:, None] & (o_v < DV))
            p_k = p_token[:, None] * D + o_d
            tl.store(grad_k + p_k, narrow(sums_k, grad_k.dtype.element_ty), mask=m_t[:, None] & (o_d < D))
