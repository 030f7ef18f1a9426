# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Forward of the attention kernels: an online softmax, or a plain sum, over the keys of a row or of one split of it."""

from __future__ import annotations

import triton
import triton.language as tl

from interformer_kernels._triton._arguments import Epilogue, KeysAndValues, Sizes
from interformer_kernels._triton._attention_masks import (
    Pairs,
    key_tiles,
    number_of_tiles,
    sees_any_key,
    tile_has_edge,
    tile_of_step,
)
from interformer_kernels._triton._attention_output import partial_index, store_outputs, store_partial
from interformer_kernels._triton._attention_scores import Variant, VariantInputs
from interformer_kernels._triton._attention_tiles import (
    load_keys,
    load_q,
    of_attempt,
    packed_rows,
    query_task,
    rows_with_nan,
    tiles_of_program,
    tokens_of_tile,
)
from interformer_kernels._triton._attention_variant import (
    empty_softmax,
    online_softmax_update,
    softmax_stats,
)
from interformer_kernels._triton._maps import dot, narrow


@triton.jit
def _over_keys(
    b_q, kv, i_pack, attempt, n, cell, head, tile, task, i_split, variant,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, SPLIT_KV: tl.constexpr,
):  # fmt: skip
    """Accumulator, largest score and row sum of a tile of queries over the keys that it sees."""
    PRECISION: tl.constexpr = SHAPE.precision
    TOKENS: tl.constexpr = SHAPE.block_k // SHAPE.pack
    row_max, row_sum = empty_softmax(SHAPE.block_q)
    acc = tl.full([SHAPE.block_q, SHAPE.block_dv], 0.0, tl.float32)
    tokens = tokens_of_tile(tile, task.count, SHAPE)
    before, start, stop, own, own_stop = key_tiles(
        tokens[0], tokens[1], task.count, task.keys, task.targets, variant, TOKENS, VARIANT
    )
    if SPLIT_KV:
        start = tl.maximum(i_split, 0) * (SPLIT_KV * SHAPE.pack // SHAPE.block_k)
        stop = tl.where(i_split < 0, stop, tl.minimum(stop, start + SPLIT_KV * SHAPE.pack // SHAPE.block_k))
        own_stop = stop
    tiles = (before, start, stop, own, own_stop)
    for step in range(0, number_of_tiles(tiles, VARIANT)):
        # The minimum changes nothing but the code: without it, every thread would carry each of its addresses along.
        i_k = tl.minimum(tile_of_step(step, tiles, VARIANT), own_stop - 1)
        j, o_h, b_k, b_v = load_keys(kv, i_pack, attempt, i_k, task, SHAPE)
        # As in the backward: Triton 3.6 cannot return the None from a function that both could call.
        if SHAPE.pack == 1:
            edge = tile_has_edge(i_k, tokens, task, variant, TOKENS, VARIANT)
            pairs = Pairs(n[:, None], j[None, :], head[:, None], task, edge, None)
        else:
            cells = cell[:, None] == o_h[None, :]
            pairs = Pairs(n[:, None], j[None, :], head[:, None], task, True, cells)
        products = dot(b_q, tl.trans(b_k), PRECISION)
        probs, alpha, row_max, row_sum = online_softmax_update(
            products, pairs, row_max, row_sum, variant, VARIANT, b_v.dtype
        )
        acc = acc * alpha[:, None] + dot(narrow(probs, b_v.dtype), b_v, PRECISION)
    row_max, row_sum = softmax_stats(row_max, row_sum, variant, VARIANT, kv.v.pointer.dtype.element_ty)
    return acc, row_max, row_sum


@triton.jit
def _attend_tile(
    i_pack, task, tile, i_split, q, kv, epilogue, outputs, partials, sizes, variant,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, GATE: tl.constexpr, SPLIT_KV: tl.constexpr,
):  # fmt: skip
    """One tile of queries over the keys of its row, or of a split of them."""
    LAYOUT: tl.constexpr = SHAPE.layout
    HEADS: tl.constexpr = SHAPE.packs * SHAPE.pack * SHAPE.q_per_kv
    ATTEMPTS: tl.constexpr = SHAPE.pack + 1 if SHAPE.pack > 1 else 1
    retry = i_pack < 0
    for attempt in range(0, ATTEMPTS):
        if retry | (attempt == 0):
            n, cell, head = packed_rows(tile, i_pack, SHAPE)
            count = of_attempt(task.count, cell, attempt, SHAPE.pack)
            m_in = n < tl.where(task.row < sizes.rows, count, 0)  # [BLOCK_Q]
            b_q = load_q(q, kv.rope, task.row, task.first, n, head, m_in, SHAPE)
            acc, row_max, row_sum = _over_keys(
                b_q, kv, i_pack, attempt, n, cell, head, tile, task, i_split, variant, SHAPE, VARIANT, SPLIT_KV
            )
            if SHAPE.pack > 1:
                retry = retry | (tl.max(rows_with_nan(acc), 0) > 0)
            if SPLIT_KV and i_split >= 0:
                index = partial_index(task.k_first, i_split, SPLIT_KV)
                store_partial(
                    acc, row_max, row_sum, partials, index, sizes.queries, count, n, head,
                    HEADS, SHAPE.dv, SHAPE.block_dv,
                )  # fmt: skip
            else:
                any_key = sees_any_key(n, task.count, task.keys, task.targets, variant, VARIANT)
                store_outputs(
                    acc, row_max, row_sum, any_key, task, count, n, head, sizes.rows, epilogue, outputs,
                    HEADS, SHAPE.dv, SHAPE.block_dv, LAYOUT, VARIANT, GATE,
                )  # fmt: skip


@triton.jit
def _attend(
    i, q, kv, offsets, tile_list, epilogue, outputs, partials, sizes, variant,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, GATE: tl.constexpr, SPLIT_KV: tl.constexpr,
):  # fmt: skip
    """The tile of a program, if it has one."""
    task, tile, i_split, idle = query_task(
        i // SHAPE.packs, offsets, tile_list, sizes, variant, SHAPE, VARIANT, SPLIT_KV
    )
    if not idle:
        _attend_tile(
            i % SHAPE.packs, task, tile, i_split, q, kv, epilogue, outputs, partials, sizes, variant,
            SHAPE, VARIANT, GATE, SPLIT_KV,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "q_tokens", "k_tokens", "queries", "skip", "left", "right", "prefix"])
def attention_forward(
    q, kv, offsets, tile_list, epilogue, outputs, partials,
    rows, q_tokens, k_tokens, queries, skip, left, right, prefix, variant_inputs,
    SHAPE: tl.constexpr, VARIANT: tl.constexpr, GATE: tl.constexpr, SPLIT_KV: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """One tile of queries over the keys that it sees, or, if PERSISTENT, several tiles of the list.

    With SPLIT_KV (a multiple of the keys of a tile), longer rows are split, a program for each split;
    `combine_partials` adds them up. Shorter rows keep their bits. Rows that fit a cell are left to
    `_attention_short.py`.
    """
    sizes = Sizes(rows, q_tokens, k_tokens, queries, skip)
    variant = Variant(VariantInputs(*variant_inputs), left, right, prefix, skip)
    kv = KeysAndValues(kv.k, kv.v, kv.rope)
    epilogue = Epilogue(epilogue.sinks, epilogue.gate, epilogue.residual)
    i = tl.program_id(0)
    count, stride = tiles_of_program(i, tile_list, SHAPE, PERSISTENT)
    for step in range(0, count, stride):
        _attend(
            i + step, q, kv, offsets, tile_list, epilogue, outputs, partials, sizes, variant,
            SHAPE, VARIANT, GATE, SPLIT_KV,
        )  # fmt: skip
