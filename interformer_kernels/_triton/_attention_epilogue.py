# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""The epilogue of attention, `residual + G(A, gate)`, its backward, and the statistics of queries that follow it."""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._attention_tiles import load_queries, packed_rows, places
from interformer_kernels._triton._attention_variant import factor_of_d_probs, grad_of_seen_lse, is_large
from interformer_kernels._triton._maps import LOG2_E, activate, activation_grad, exp2, narrow
from interformer_kernels._triton._rows import edge


@triton.jit
def apply_epilogue(acc, epilogue, row, first, n, head, m_load, o_v, LAYOUT: tl.constexpr, GATE: tl.constexpr):
    """`residual + G(A, gate)` of a tile of attention outputs."""
    ACTIVATION: tl.constexpr = GATE.activation
    if epilogue.gate is not None:
        gate = epilogue.gate
        p_gate = places(gate, row, first, n, head, LAYOUT)[:, None] + o_v.to(tl.int64) * gate.channel
        b_gate = tl.load(gate.pointer + p_gate, mask=m_load, other=0.0).to(tl.float32)
        if GATE.form == "multiply":
            acc = acc * activate(b_gate, ACTIVATION, gate.pointer.dtype.element_ty)
        else:
            acc = activate(acc * b_gate, ACTIVATION, gate.pointer.dtype.element_ty)
    if epilogue.residual is not None:
        p_residual = places(epilogue.residual, row, first, n, head, LAYOUT)[:, None] + o_v
        acc = acc + tl.load(epilogue.residual.pointer + p_residual, mask=m_load, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _gate_backward(b_grad, b_a, gate, row, n, head, mask, o_v, GATE: tl.constexpr):
    """Gradients of A and of the gate, from the output's gradient and A."""
    ACTIVATION: tl.constexpr = GATE.activation
    dtype: tl.constexpr = gate.pointer.dtype.element_ty
    p_gate = row * gate.row + n[:, None] * gate.token + head * gate.head + o_v.to(tl.int64) * gate.channel
    b_gate = tl.load(gate.pointer + p_gate, mask=mask, other=0.0).to(tl.float32)
    if GATE.form == "multiply":
        b_grad_gate = b_grad * b_a * activation_grad(b_gate, ACTIVATION, dtype)
        b_grad = b_grad * activate(b_gate, ACTIVATION, dtype)
    else:
        b_inner = b_grad * activation_grad(b_a * b_gate, ACTIVATION, dtype)
        b_grad_gate = b_inner * b_a
        b_grad = b_inner * b_gate
    return b_grad, b_grad_gate


@triton.jit(do_not_specialize=["rows", "q_tokens", "queries"])
def epilogue_backward(
    grad_out, attn_out, gate, grad_attn_out, delta, grad_gate, q_offsets, rows, q_tokens, queries,
    HEADS: tl.constexpr, DV: tl.constexpr, LAYOUT: tl.constexpr, GATE: tl.constexpr,
    SUM_TOKENS: tl.constexpr, SUM_CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Gradients of A and of the gate, and delta, of a block of query tokens under one head.

    `delta` may be None. `grad_gate` holds sums over the channels, or over the block's tokens, where the gate
    broadcasts along them.
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
    p_grad = row * grad_out.row + n[:, None] * grad_out.token + head * grad_out.head + o_v
    b_grad = tl.load(grad_out.pointer + p_grad, mask=m_load, other=0.0).to(tl.float32)
    b_a = tl.load(attn_out + p_out, mask=m_load, other=0.0)
    b_grad, b_grad_gate = _gate_backward(b_grad, b_a, gate, row, n, head, m_load, o_v, GATE)
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
    if delta is not None:
        p_pair = 2 * (t * HEADS + head)
        tl.store(delta + p_pair, tl.zeros([BLOCK_T], tl.float32), mask=t < q_tokens)
        tl.store(delta + p_pair + 1, tl.sum(b_grad * b_a, 1), mask=t < q_tokens)


@triton.jit
def delta_of_queries(side, b_grad, p_head, m_in, SHAPE: tl.constexpr):
    """Delta of a tile of queries from A and from its gradient."""
    o_v = tl.arange(0, SHAPE.block_dv)
    b_a = tl.load(side.attn_out + (p_head[:, None] * SHAPE.dv + o_v), mask=m_in[:, None] & (o_v < SHAPE.dv), other=0.0)
    return tl.sum(b_grad.to(tl.float32) * b_a, 1)


@triton.jit
def store_stats(to, p_head, m_q, row_sum, delta):
    """Store statistics of queries: pairs of a sum, or its log2, and delta."""
    tl.store(to + 2 * p_head, row_sum, mask=m_q)
    tl.store(to + 2 * p_head + 1, delta, mask=m_q)


@triton.jit
def store_delta(side, to, tile, i_pack, task, rows, SHAPE: tl.constexpr):
    """Store delta of the queries of a tile, from A where that is given, and say whether that is all: whether no query
    has lost digits, and gets sums.
    """
    HEADS: tl.constexpr = SHAPE.packs * SHAPE.pack * SHAPE.q_per_kv
    LAYOUT: tl.constexpr = SHAPE.layout
    n, _, head = packed_rows(tile, i_pack, SHAPE)
    p_head = (task.first + n) * HEADS + head
    m_q = n < task.count  # [BLOCK_Q]
    large = is_large(tl.load(side.lse + p_head, mask=m_q, other=0.0))
    if side.attn_out is not None:
        m_in = n < tl.where(task.row < rows, task.count, 0)
        b_grad = load_queries(side.grad, task.row, task.first, n, head, m_in, SHAPE.dv, SHAPE.block_dv, LAYOUT)
        b_delta = delta_of_queries(side, b_grad, p_head, m_in, SHAPE)
        store_stats(to, p_head, m_q & (large == 0), b_delta * 0.0, b_delta)
    return tl.max(large.to(tl.int32), 0) == 0


@triton.jit
def _load_per_query(p, mask):
    """A number for each query; zero where the mask says no.

    As a tile of eight copies: of a smaller one, Triton 3.6 has every thread load all the numbers that it uses.
    """
    copies = tl.zeros([1, 8], tl.int32)
    return tl.max(tl.load(p[:, None] + copies, mask=mask[:, None], other=0.0), 1)


@triton.jit
def load_raw_stats(side, b_grad, p_head, m_in, SHAPE: tl.constexpr, PASS: tl.constexpr):
    """Log-sum-exp of queries, and the statistics in memory as far as they need no sums over keys."""
    lse = _load_per_query(side.lse + p_head, m_in)
    row_sum = tl.full([SHAPE.block_q], 0.0, tl.float32)
    delta = row_sum
    if side.attn_out is not None:
        delta = delta_of_queries(side, b_grad, p_head, m_in, SHAPE)
    elif PASS.only_large_lse:
        delta = _load_per_query(side.delta + 2 * p_head + 1, m_in)
    return lse, row_sum, delta


@triton.jit
def _sink_probs(sinks, head, lse):
    """Probabilities of the sinks by the log-sum-exp of queries; 0 on the tail."""
    probs = exp2((tl.load(sinks + head) - lse) * LOG2_E, tl.float32)
    return tl.where(lse == float("-inf"), 0.0, probs)


@triton.jit
def sums_to_stats(side, head, lse, row_sum, mean, FP32_SOFTMAX: tl.constexpr):
    """The statistics in memory, from the sums of P and of P * dP; in float32 they are the same, and sinks are added as
    the statistics are read, for sums may be those of a split."""
    if not FP32_SOFTMAX:
        if side.sinks is not None:
            row_sum += _sink_probs(side.sinks, head, lse)
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
        mean = mean / row_sum
        row_sum = tl.log2(row_sum)
    return row_sum, mean


@triton.jit
def finish_query_stats(side, p_head, head, m_q, keys, lse, row_sum, delta, FP32_SOFTMAX: tl.constexpr):
    """Log-sum-exp, sum of probabilities, and delta less dlse, from those in memory."""
    if FP32_SOFTMAX:
        if side.sinks is not None:
            row_sum += _sink_probs(side.sinks, head, lse)
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
        delta = tl.div_rn(delta, row_sum)
    # lse = -inf: the query is fully masked (delta is 0), or its scores are all -inf (delta is NaN). With
    # disordered offsets such a query may see finite scores after all.
    masked = lse == float("-inf")
    lse = tl.where(masked, delta * 0.0, lse)
    if side.grad_lse is not None:
        grad_lse = grad_of_seen_lse(_load_per_query(side.grad_lse + p_head, m_q), masked)
        if side.sinks is None:
            delta = delta * factor_of_d_probs(keys)
        delta = delta - grad_lse
    return lse, row_sum, delta


@triton.jit
def load_query_stats(
    side, p_head, head, m_q, keys, VARIANT: tl.constexpr, FP32_SOFTMAX: tl.constexpr, WITH_DELTA: tl.constexpr
):
    """Log-sum-exp of queries, the sum of their probabilities by it (without FP32_SOFTMAX its log2), and delta less
    dlse, the latter two where they are known; `keys` is the number of their row's keys."""
    b_lse = (p_head * 0).to(tl.float32)
    b_delta = b_lse
    row_sum = b_lse + 1.0 if FP32_SOFTMAX else b_lse
    if VARIANT.score == "softmax":
        b_lse = _load_per_query(side.lse + p_head, m_q)
        if WITH_DELTA:
            row_sum = _load_per_query(side.delta + 2 * p_head, m_q)
            b_delta = _load_per_query(side.delta + 2 * p_head + 1, m_q)
            b_lse, row_sum, b_delta = finish_query_stats(
                side, p_head, head, m_q, keys, b_lse, row_sum, b_delta, FP32_SOFTMAX
            )
    return b_lse, row_sum, b_delta


@triton.jit(do_not_specialize=["rows", "q_tokens"])
def sinks_backward(
    lse, delta, grad_lse, sinks, sums, q_offsets, rows, q_tokens,
    HEADS: tl.constexpr, LAYOUT: tl.constexpr, FP32_SOFTMAX: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sums `[blocks, H]` of the gradients of the sinks over a block of query tokens under one head, from the statistics
    that the passes over queries have left: a sink is one more key, whose value is 0."""
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    block = (tl.program_id(0) // HEADS).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    end = q_tokens
    if LAYOUT == "packed":
        end = edge(q_offsets, rows, q_tokens)
    mask = t < end
    p_head = t * HEADS + head
    b_lse = tl.load(lse + p_head, mask=mask, other=float("-inf"))
    row_sum = tl.load(delta + 2 * p_head, mask=mask, other=0.0)
    b_delta = tl.load(delta + 2 * p_head + 1, mask=mask, other=0.0)
    probs = _sink_probs(sinks, head, b_lse)
    if FP32_SOFTMAX:
        row_sum += probs
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
        probs = tl.div_rn(probs, row_sum)
        b_delta = tl.div_rn(b_delta, row_sum)
    else:
        probs = probs * tl.exp2(-row_sum)
    if grad_lse is not None:
        b_delta -= tl.load(grad_lse + p_head, mask=mask, other=0.0)
    tl.store(sums + block * HEADS + head, tl.sum(tl.where(mask, -probs * b_delta, 0.0), 0))
