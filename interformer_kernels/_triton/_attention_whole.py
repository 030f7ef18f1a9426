# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""The backward of rows of up to `SHAPE.most` tokens of the packed layout, a program for each row and key/value head.

A program has all keys and values of its row, and reads queries tile by tile: inputs are read once, outputs are written
once, and there are five products, without a pass before. A launch takes the rows of more than `SHAPE.cell` tokens;
those that fit a cell of `_attention_short.py` are left to that. The kernels of longer rows leave out all of them
(`_attention_tiles.is_short`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._arguments import KeysAndValues, RowTask, Sizes
from interformer_kernels._triton._attention_masks import Pairs, targets_of
from interformer_kernels._triton._attention_scores import Variant, VariantInputs
from interformer_kernels._triton._attention_short import SIZES
from interformer_kernels._triton._attention_tiles import load_k, load_numbers, load_q, load_tokens, store_tokens
from interformer_kernels._triton._attention_variant import (
    remaining_scale,
    whole_row_d_scores,
    whole_row_probs,
)
from interformer_kernels._triton._maps import dot, narrow
from interformer_kernels._triton._rope import columns, rotate_k, rotate_q
from interformer_kernels._triton._rows import span


@triton.jit
def _over_queries(
    q, rope, b_k, b_v, grad_attn_out, lse, grad_lse, grad_q, i_head, j, task, variant, rest,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """dQ of a row, stored, and its dK and dV, but for `rest` of dK."""
    PRECISION: tl.constexpr = SHAPE.precision
    Q_PER_KV: tl.constexpr = SHAPE.q_per_kv
    BLOCK: tl.constexpr = SHAPE.block
    acc_k = tl.full([b_k.shape[0], SHAPE.block_d], 0.0, tl.float32)
    acc_v = tl.full([b_v.shape[0], SHAPE.block_dv], 0.0, tl.float32)
    # A loop takes registers for the addresses of its next step.
    if SHAPE.most * Q_PER_KV <= BLOCK:
        steps = 1
    else:
        steps = tl.cdiv(task.count * Q_PER_KV, BLOCK)
    for i_q in range(0, steps):
        o_q = i_q * BLOCK + tl.arange(0, BLOCK)
        n = o_q // Q_PER_KV
        head = i_head * Q_PER_KV + o_q % Q_PER_KV
        p_q = (task.first + n) * (SHAPE.kv_heads * Q_PER_KV) + head
        m_q = n < task.count
        b_q = load_q(q, rope, task.row, task.first, n, head, m_q, SHAPE)
        b_grad = load_tokens(grad_attn_out, task.first, n, head, m_q, SHAPE.dv, SHAPE.block_dv)
        b_lse = load_numbers(lse, p_q, m_q)
        b_grad_lse = load_numbers(grad_lse, p_q, m_q)
        pairs = Pairs(n[:, None], j[None, :], head[:, None], task, True, None)
        products = dot(b_q, tl.trans(b_k), PRECISION)
        probs = whole_row_probs(products, pairs, b_lse, variant, VARIANT, b_v.dtype)
        # Probabilities are done with before gradients take registers.
        acc_v += dot(tl.trans(narrow(probs, b_grad.dtype)), b_grad, PRECISION)
        d_probs = dot(b_grad, tl.trans(b_v), PRECISION)
        d_scores = whole_row_d_scores(products, probs, d_probs, b_lse, b_grad_lse, pairs, variant, VARIANT, b_v.dtype)
        d_scores = narrow(d_scores, b_q.dtype)
        acc_k += dot(tl.trans(d_scores), b_q, PRECISION)
        acc_q = dot(d_scores, b_k, PRECISION) * rest
        acc_q = rotate_q(acc_q, rope, task.first, n, m_q, SHAPE, True)
        store_tokens(grad_q, p_q, m_q, acc_q, columns(SHAPE.block_d, SHAPE.half, SHAPE.interleaved), SHAPE.d)
    return acc_k, acc_v


@triton.jit(do_not_specialize=SIZES)
def attention_backward_whole(
    q, kv, offsets, grad_attn_out, lse, grad_lse, grad_q, grad_k, grad_v,
    rows, q_tokens, k_tokens, left, right, prefix, variant_inputs,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of a row of more tokens than a cell has, on either side, under the query heads that share a
    key/value head."""
    sizes = Sizes(rows, q_tokens, k_tokens, 0, 0)
    variant = Variant(VariantInputs(*variant_inputs), left, right, prefix, 0)
    kv = KeysAndValues(kv.k, kv.v, kv.rope)
    i_head = (tl.program_id(0) % SHAPE.kv_heads).to(tl.int64)
    row = tl.program_id(0) // SHAPE.kv_heads
    first, count = span(offsets.q, row, sizes.rows, sizes.q_tokens)
    k_first, keys = span(offsets.kv, row, sizes.rows, sizes.k_tokens)
    longest = tl.maximum(count, keys)
    if (longest <= SHAPE.cell) | (longest > SHAPE.most):
        return
    targets = targets_of(row, sizes.rows, count, keys, variant, VARIANT)
    task = RowTask(row, first, count, k_first, keys, targets)
    j = tl.arange(0, SHAPE.most)
    m_k = j < keys
    b_k = load_k(kv.k, kv.rope, k_first, j, i_head, m_k, SHAPE)
    b_v = load_tokens(kv.v, k_first, j, i_head, m_k, SHAPE.dv, SHAPE.block_dv)
    rest = remaining_scale(keys, variant, VARIANT, b_v.dtype)
    acc_k, acc_v = _over_queries(
        q, kv.rope, b_k, b_v, grad_attn_out, lse, grad_lse, grad_q, i_head, j, task, variant, rest, SHAPE, VARIANT
    )
    p_k = (k_first + j) * SHAPE.kv_heads + i_head
    acc_k = rotate_k(acc_k * rest, kv.rope, k_first, j, m_k, SHAPE, True)
    store_tokens(grad_k, p_k, m_k, acc_k, columns(SHAPE.block_d, SHAPE.half, SHAPE.interleaved), SHAPE.d)
    store_tokens(grad_v, p_k, m_k, acc_v, tl.arange(0, SHAPE.block_dv), SHAPE.dv)
