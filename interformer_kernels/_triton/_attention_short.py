"""Short rows of the packed layout, several to a program: each is whole in a cell of the tile, and sees its own cell.

Of thousands of rows of few tokens, a program of one row would be mostly empty, and would look for it, too: here row
`r` is cell `r % (BLOCK / CELL)` of program `r // (BLOCK / CELL)`. As all keys of a row are at hand, the softmax is the
plain one, and one pass is the whole backward. Whether a row is short depends on itself alone; the kernels of long rows
leave out what `_attention_tiles.is_short` says. Zeros of other cells change no sum, and cells begin at multiples of
powers of two: so the bits of a row do not depend on its cell. Of what is not finite in another cell there are attempts
for each cell alone (`_attention_tiles.of_attempt`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._attention_output import finish
from interformer_kernels._triton._attention_tiles import (
    fold,
    not_numbers,
    of_attempt,
    rest_of_scale,
    scaled,
    sees_some,
    visible,
    weigh,
)
from interformer_kernels._triton._maps import dot, narrow
from interformer_kernels._triton._rows import span

SIZES = ["rows", "q_tokens", "k_tokens", "left", "right", "prefix"]


@triton.jit
def _lanes(i, attempt, q_offsets, kv_offsets, rows, q_tokens, k_tokens, CELL: tl.constexpr, BLOCK: tl.constexpr):
    """Of each lane: cell, index in its row, first query and number of queries, first key and number of keys of the row;
    no queries and no keys where the row is not short, or not the attempt's.
    """
    o = tl.arange(0, BLOCK)
    row = i * (BLOCK // CELL) + o // CELL
    q_first, queries = span(q_offsets, row, rows, q_tokens)
    k_first, keys = span(kv_offsets, row, rows, k_tokens)
    cell = o // CELL
    fits = (queries <= CELL) & (keys <= CELL)
    queries = of_attempt(tl.where(fits, queries, 0), cell, attempt, BLOCK // CELL)
    keys = of_attempt(tl.where(fits, keys, 0), cell, attempt, BLOCK // CELL)
    return cell, o % CELL, q_first, queries, k_first, keys


@triton.jit
def _load(x, p, m, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels `[BLOCK, BLOCK_C]` of some tokens; zero where there is none."""
    o_c = tl.arange(0, BLOCK_C)
    return tl.load(x + p[:, None] + o_c, mask=m[:, None] & (o_c < C)[None, :], other=0.0)


@triton.jit
def _store(x, p, m, values, C: tl.constexpr, BLOCK_C: tl.constexpr):
    o_c = tl.arange(0, BLOCK_C)
    tl.store(x + p[:, None] * C + o_c, narrow(values, x.dtype.element_ty), mask=m[:, None] & (o_c < C)[None, :])


@triton.jit
def _tile(
    i, i_head, attempt, k, v, q_offsets, kv_offsets, rows, q_tokens, k_tokens, left, right, prefix,
    k_token, k_head, v_token, v_head,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PREFIX: tl.constexpr, CELL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Of a program's lanes: the token of its row that each is, the rows, their keys and values, and who sees whom."""
    cell, n, q_first, queries, k_first, keys = _lanes(
        i, attempt, q_offsets, kv_offsets, rows, q_tokens, k_tokens, CELL, BLOCK
    )
    b_k = _load(k, (k_first + n) * k_token + i_head * k_head, n < keys, D, BLOCK_D)
    b_v = _load(v, (k_first + n) * v_token + i_head * v_head, n < keys, DV, BLOCK_DV)
    m_seen = visible(
        n[:, None], n[None, :], queries[:, None], keys[:, None], left, right, prefix, CAUSAL, LEFT, RIGHT, PREFIX
    )
    m_seen = m_seen & (cell[:, None] == cell[None, :])
    return n, q_first, queries, k_first, keys, b_k, b_v, m_seen


@triton.jit(do_not_specialize=SIZES)
def attention_forward_short(
    q, k, v, gate, residual, out, lse, attn_out, q_offsets, kv_offsets,
    rows, q_tokens, k_tokens, left, right, prefix, scale, post_scale,
    q_token, q_head, k_token, k_head, v_token, v_head,
    gate_row, gate_token, gate_head, gate_channel, residual_row, residual_token, residual_head,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, SCORE: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr,
    GATE: tl.constexpr, FORM: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    CELL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of some short rows, of all query heads that share a key/value head."""
    i_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    i = tl.program_id(0) // KV_HEADS
    again = tl.program_id(0) < 0
    for attempt in range(0, BLOCK // CELL + 1):
        if again | (attempt == 0):
            n, q_first, queries, _k_first, keys, b_k, b_v, m_seen = _tile(
                i, i_head, attempt, k, v, q_offsets, kv_offsets, rows, q_tokens, k_tokens, left, right, prefix,
                k_token, k_head, v_token, v_head,
                D, DV, CAUSAL, LEFT, RIGHT, PREFIX, CELL, BLOCK, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            some = sees_some(n, queries, keys, left, right, prefix, CAUSAL, LEFT, RIGHT, PREFIX)
            bad = tl.zeros([BLOCK], tl.int32)
            for g in range(0, GROUP):
                head = i_head * GROUP + g
                b_q = _load(q, (q_first + n) * q_token + head * q_head, n < queries, D, BLOCK_D)
                s = dot(b_q, tl.trans(b_k), PRECISION)
                largest = tl.full([BLOCK], float("-inf"), tl.float32)
                total = tl.zeros([BLOCK], tl.float32)
                weights, _, largest, total = fold(
                    s, m_seen, largest, total, keys[:, None], scale, post_scale, SCORE, b_v.dtype
                )
                sums = dot(narrow(weights, b_v.dtype), b_v, PRECISION)
                bad = bad | not_numbers(sums)
                finish(
                    sums, largest, total, keys, some, gate, residual, out, lse, attn_out,
                    i * 0, rows, q_first, queries, n, head,
                    gate_row, gate_token, gate_head, gate_channel, residual_row, residual_token, residual_head,
                    KV_HEADS * GROUP, DV, "packed", SCORE, GATE, FORM, ACTIVATION, RESIDUAL, KEEP, BLOCK_DV,
                )  # fmt: skip
            again = again | (tl.max(bad, 0) > 0)


@triton.jit(do_not_specialize=SIZES)
def attention_backward_short(
    q, k, v, grad_attn_out, grad_q, grad_k, grad_v, q_offsets, kv_offsets,
    rows, q_tokens, k_tokens, left, right, prefix, scale, post_scale,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, SCORE: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr,
    CELL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of some short rows, of all query heads that share a key/value head."""
    i_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    i = tl.program_id(0) // KV_HEADS
    again = tl.program_id(0) < 0
    for attempt in range(0, BLOCK // CELL + 1):
        if again | (attempt == 0):
            n, q_first, queries, k_first, keys, b_k, b_v, m_seen = _tile(
                i, i_head, attempt, k, v, q_offsets, kv_offsets, rows, q_tokens, k_tokens, left, right, prefix,
                k_token, k_head, v_token, v_head,
                D, DV, CAUSAL, LEFT, RIGHT, PREFIX, CELL, BLOCK, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            sums_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
            sums_v = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
            bad = tl.zeros([BLOCK], tl.int32)
            rest = rest_of_scale(scale, keys, SCORE, b_v.dtype)[:, None]
            for g in range(0, GROUP):
                head = i_head * GROUP + g
                b_q = _load(q, (q_first + n) * q_token + head * q_head, n < queries, D, BLOCK_D)
                p_grad = (q_first + n) * grad_token + head * grad_head
                b_grad = _load(grad_attn_out, p_grad, n < queries, DV, BLOCK_DV)
                s = dot(b_q, tl.trans(b_k), PRECISION)
                grad = dot(b_grad, tl.trans(b_v), PRECISION)
                nothing = tl.zeros([BLOCK], tl.float32)
                if SCORE == "softmax":
                    weights, _, largest, total = fold(
                        s, m_seen, nothing + float("-inf"), nothing, keys[:, None], scale, post_scale, SCORE, b_v.dtype
                    )
                    # Scores of nothing but -inf have weights of NaN, as in PyTorch.
                    total = tl.where(largest == float("-inf"), float("nan"), total)
                    weights = tl.where(m_seen, weights * tl.div_rn(1.0, total)[:, None], 0.0)
                    delta = tl.sum(tl.where(m_seen, weights * grad, 0.0), 1)
                    # No value that is not finite goes through a mask.
                    grads = tl.where(m_seen, scaled(weights * (grad - delta[:, None]), scale, b_v.dtype), 0.0)
                else:
                    weights, grads = weigh(s, grad, m_seen, nothing, nothing, nothing, scale, SCORE, b_v.dtype)
                grads = narrow(grads, b_q.dtype)
                p_q = (q_first + n) * (KV_HEADS * GROUP) + head
                sums_q = dot(grads, b_k, PRECISION) * rest
                _store(grad_q, p_q, n < queries, sums_q, D, BLOCK_D)
                sums_k += dot(tl.trans(grads), b_q, PRECISION)
                sums_v += dot(tl.trans(narrow(weights, b_grad.dtype)), b_grad, PRECISION)
                bad = bad | not_numbers(sums_q)
            bad = bad | not_numbers(sums_k) | not_numbers(sums_v)
            again = again | (tl.max(bad, 0) > 0)
            p_k = (k_first + n) * KV_HEADS + i_head
            _store(grad_k, p_k, n < keys, sums_k * rest, D, BLOCK_D)
            _store(grad_v, p_k, n < keys, sums_v, DV, BLOCK_DV)
