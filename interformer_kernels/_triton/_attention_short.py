# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Short rows of the packed layout, several to a program: each has a cell of the tile, and sees its own cell.

For thousands of rows of few tokens, a program per row would be mostly empty, and would search for its row as well.
Here row `r` is cell `r % (block / cell)` of program `r // (block / cell)`. As all keys of a row are at hand, the
softmax is the plain one, and one pass is the whole backward. Whether a row is short depends on the row alone; the
kernels of long rows leave out the rows that `_attention_tiles.is_short` names. Zeros of other cells change no sum, and
cells begin at multiples of powers of two, so the bits of a row do not depend on its cell. Numbers of another cell that
are not finite are kept out by an attempt for each cell alone (`_attention_tiles.of_attempt`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._arguments import Epilogue, KeysAndValues, RowTask, Sizes
from interformer_kernels._triton._attention_masks import Pairs, pairs_under, sees_any_key, targets_of
from interformer_kernels._triton._attention_output import store_outputs
from interformer_kernels._triton._attention_scores import Variant, VariantInputs
from interformer_kernels._triton._attention_tiles import (
    load_k,
    load_numbers,
    load_q,
    load_tokens,
    of_attempt,
    rows_with_nan,
    store_tokens,
)
from interformer_kernels._triton._attention_variant import (
    empty_softmax,
    online_softmax_update,
    remaining_scale,
    softmax_stats,
    whole_row_to_probs,
)
from interformer_kernels._triton._maps import dot, narrow
from interformer_kernels._triton._rope import columns, rotate_k, rotate_q
from interformer_kernels._triton._rows import span

SIZES = ["rows", "q_tokens", "k_tokens", "left", "right", "prefix"]


@triton.jit
def _lanes(i, attempt, offsets, sizes, variant, VARIANT: tl.constexpr, CELL: tl.constexpr, BLOCK: tl.constexpr):
    """For each lane its cell, its index in the row, and the row; no queries and no keys where the row is not short, or
    not the attempt's.
    """
    o = tl.arange(0, BLOCK)
    row = i * (BLOCK // CELL) + o // CELL
    q_first, queries = span(offsets.q, row, sizes.rows, sizes.q_tokens)
    k_first, keys = span(offsets.kv, row, sizes.rows, sizes.k_tokens)
    cell = o // CELL
    fits = (queries <= CELL) & (keys <= CELL)
    queries = of_attempt(tl.where(fits, queries, 0), cell, attempt, BLOCK // CELL)
    keys = of_attempt(tl.where(fits, keys, 0), cell, attempt, BLOCK // CELL)
    targets = targets_of(row, sizes.rows, queries, keys, variant, VARIANT)
    # The number of the row is not needed any more, and every row that is here has tokens.
    return cell, o % CELL, RowTask(i * 0, q_first, queries, k_first, keys, targets)


@triton.jit
def _is_idle(i, offsets, sizes, CELL: tl.constexpr, CELLS: tl.constexpr):
    """Whether none of a program's rows is short and has tokens, where that is likely: where the mean row is longer.

    Elsewhere all programs would wait for the answer. Numbers are scalars, so no warp waits for another.
    """
    likely = sizes.q_tokens > sizes.rows.to(tl.int64) * CELL
    tokens = i * 0
    if likely:
        for cell in tl.static_range(CELLS):
            _, queries = span(offsets.q, i * CELLS + cell, sizes.rows, sizes.q_tokens)
            _, keys = span(offsets.kv, i * CELLS + cell, sizes.rows, sizes.k_tokens)
            tokens |= tl.where((queries <= CELL) & (keys <= CELL), queries | keys, 0)
    return likely & (tokens == 0)


@triton.jit
def _tile(i, i_head, attempt, kv, offsets, sizes, variant, SHAPE: tl.constexpr, VARIANT: tl.constexpr):
    """A program's lanes: the token of its row that each one is, the rows, their keys and values, and the pairs of
    queries and keys, under the first query head of the key/value head."""
    cell, n, task = _lanes(i, attempt, offsets, sizes, variant, VARIANT, SHAPE.cell, SHAPE.block)
    b_k = load_k(kv.k, kv.rope, task.k_first, n, i_head, n < task.keys, SHAPE)
    b_v = load_tokens(kv.v, task.k_first, n, i_head, n < task.keys, SHAPE.dv, SHAPE.block_dv)
    cells = cell[:, None] == cell[None, :]
    rows = RowTask(
        task.row, task.first[:, None], task.count[:, None], task.k_first[:, None], task.keys[:, None],
        task.targets[:, None],
    )  # fmt: skip
    pairs = Pairs(n[:, None], n[None, :], i_head * SHAPE.q_per_kv, rows, True, cells)
    return n, task, b_k, b_v, pairs


@triton.jit(do_not_specialize=SIZES)
def attention_forward_short(
    q, kv, offsets, epilogue, outputs, rows, q_tokens, k_tokens, left, right, prefix, variant_inputs,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Outputs of some short rows, of all query heads that share a key/value head."""
    PRECISION: tl.constexpr = SHAPE.precision
    sizes = Sizes(rows, q_tokens, k_tokens, 0, 0)
    variant = Variant(VariantInputs(*variant_inputs), left, right, prefix, 0)
    kv = KeysAndValues(kv.k, kv.v, kv.rope)
    epilogue = Epilogue(epilogue.sinks, epilogue.gate, epilogue.residual)
    i_head = (tl.program_id(0) % SHAPE.kv_heads).to(tl.int64)
    i = tl.program_id(0) // SHAPE.kv_heads
    if kv.k.pointer.dtype.element_ty != tl.float32:  # noqa: SIM102 (a constant; float32's forward spills with a look ahead)
        if _is_idle(i, offsets, sizes, SHAPE.cell, SHAPE.block // SHAPE.cell):
            return
    retry = tl.program_id(0) < 0
    for attempt in range(0, SHAPE.block // SHAPE.cell + 1):
        if retry | (attempt == 0):
            n, task, b_k, b_v, pairs = _tile(i, i_head, attempt, kv, offsets, sizes, variant, SHAPE, VARIANT)
            any_key = sees_any_key(n, task.count, task.keys, task.targets, variant, VARIANT)
            bad = tl.full([SHAPE.block], 0, tl.int32)
            for g in range(0, SHAPE.q_per_kv):
                head = i_head * SHAPE.q_per_kv + g
                b_q = load_q(q, kv.rope, task.row, task.first, n, head, n < task.count, SHAPE)
                products = dot(b_q, tl.trans(b_k), PRECISION)
                row_max, row_sum = empty_softmax(SHAPE.block)
                probs, _, row_max, row_sum = online_softmax_update(
                    products, pairs_under(pairs, head), row_max, row_sum, variant, VARIANT, b_v.dtype
                )
                row_max, row_sum = softmax_stats(row_max, row_sum, variant, VARIANT, b_v.dtype)
                acc = dot(narrow(probs, b_v.dtype), b_v, PRECISION)
                bad = bad | rows_with_nan(acc)
                store_outputs(
                    acc, row_max, row_sum, any_key, task, task.count, n, head, rows, epilogue, outputs,
                    SHAPE.kv_heads * SHAPE.q_per_kv, SHAPE.dv, SHAPE.block_dv, "packed", VARIANT, GATE,
                )  # fmt: skip
            retry = retry | (tl.max(bad, 0) > 0)


@triton.jit(do_not_specialize=SIZES)
def attention_backward_short(
    q, kv, offsets, grad_attn_out, grad_lse, grad_q, grad_k, grad_v,
    rows, q_tokens, k_tokens, left, right, prefix, variant_inputs,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of some short rows, of all query heads that share a key/value head."""
    PRECISION: tl.constexpr = SHAPE.precision
    sizes = Sizes(rows, q_tokens, k_tokens, 0, 0)
    variant = Variant(VariantInputs(*variant_inputs), left, right, prefix, 0)
    kv = KeysAndValues(kv.k, kv.v, kv.rope)
    i_head = (tl.program_id(0) % SHAPE.kv_heads).to(tl.int64)
    i = tl.program_id(0) // SHAPE.kv_heads
    if _is_idle(i, offsets, sizes, SHAPE.cell, SHAPE.block // SHAPE.cell):
        return
    retry = tl.program_id(0) < 0
    for attempt in range(0, SHAPE.block // SHAPE.cell + 1):
        if retry | (attempt == 0):
            n, task, b_k, b_v, pairs = _tile(i, i_head, attempt, kv, offsets, sizes, variant, SHAPE, VARIANT)
            acc_k = tl.full([SHAPE.block, SHAPE.block_d], 0.0, tl.float32)
            acc_v = tl.full([SHAPE.block, SHAPE.block_dv], 0.0, tl.float32)
            bad = tl.full([SHAPE.block], 0, tl.int32)
            rest = remaining_scale(task.keys, variant, VARIANT, b_v.dtype)[:, None]
            o_d = columns(SHAPE.block_d, SHAPE.half, SHAPE.interleaved)
            for g in range(0, SHAPE.q_per_kv):
                head = i_head * SHAPE.q_per_kv + g
                m_q = n < task.count
                b_q = load_q(q, kv.rope, task.row, task.first, n, head, m_q, SHAPE)
                b_grad = load_tokens(grad_attn_out, task.first, n, head, m_q, SHAPE.dv, SHAPE.block_dv)
                products = dot(b_q, tl.trans(b_k), PRECISION)
                d_probs = dot(b_grad, tl.trans(b_v), PRECISION)
                p_q = (task.first + n) * (SHAPE.kv_heads * SHAPE.q_per_kv) + head
                b_grad_lse = load_numbers(grad_lse, p_q, m_q)
                probs, d_scores = whole_row_to_probs(
                    products, d_probs, b_grad_lse, pairs_under(pairs, head), variant, VARIANT, b_v.dtype
                )
                d_scores = narrow(d_scores, b_q.dtype)
                acc_q = dot(d_scores, b_k, PRECISION) * rest
                b_dq = rotate_q(acc_q, kv.rope, task.first, n, m_q, SHAPE, True)
                store_tokens(grad_q, p_q, m_q, b_dq, o_d, SHAPE.d)
                acc_k += dot(tl.trans(d_scores), b_q, PRECISION)
                acc_v += dot(tl.trans(narrow(probs, b_grad.dtype)), b_grad, PRECISION)
                bad = bad | rows_with_nan(acc_q)
            bad = bad | rows_with_nan(acc_k) | rows_with_nan(acc_v)
            retry = retry | (tl.max(bad, 0) > 0)
            p_k = (task.k_first + n) * SHAPE.kv_heads + i_head
            m_k = n < task.keys
            acc_k = rotate_k(acc_k * rest, kv.rope, task.k_first, n, m_k, SHAPE, True)
            store_tokens(grad_k, p_k, m_k, acc_k, o_d, SHAPE.d)
            store_tokens(grad_v, p_k, m_k, acc_v, tl.arange(0, SHAPE.block_dv), SHAPE.dv)
