"""The attention family in Triton: one set of kernels for the three ops and all layouts, launched from here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from interformer_kernels._calls import AttentionCall
from interformer_kernels._launch import splits
from interformer_kernels._launch.gate_gradient import gate_gradient, gate_sums
from interformer_kernels._launch.tensors import expanded, readable, resolved
from interformer_kernels._triton import _run
from interformer_kernels._triton._arguments import Epilogue, GradPass, Outputs, Partials, QuerySide
from interformer_kernels._triton._attention_backward import attention_grad_queries
from interformer_kernels._triton._attention_bias_sums import grad_biases
from interformer_kernels._triton._attention_epilogue import epilogue_backward, sinks_backward
from interformer_kernels._triton._attention_forward import attention_forward
from interformer_kernels._triton._attention_grad_keys import attention_grad_keys
from interformer_kernels._triton._attention_output import add_partials, combine_partials
from interformer_kernels._triton._attention_problem import Problem
from interformer_kernels._triton._attention_short import attention_backward_short, attention_forward_short
from interformer_kernels._triton._attention_whole import attention_backward_whole
from interformer_kernels._triton._programs import Splits
from interformer_kernels._triton._tiles import Tiles, padded
from interformer_kernels._triton.apply_rotary import rotated

_TILE_NUMBERS = 4096  # of a tile of the epilogue's backward
_SINK_TOKENS = 1024  # of a sum of gradients of the sinks


class _Groups(NamedTuple):
    """Gradients of shared queries are summed over groups of rows, and shards of every row's keys."""

    number: int
    rows: int  # of a group
    key_shards: int


def forward(call: AttentionCall, residual: Tensor | None, keep_attn_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, lse, attn_out)`; `lse` is empty without softmax, `attn_out` unless it is to be kept."""
    problem, k, softmax = Problem(call), call.k, call.score == "softmax"
    shape = problem.out_shape
    out = k.new_empty(shape)
    lse = k.new_empty(shape[:-1] if softmax else (0,), dtype=torch.float32)
    attn_out = k.new_empty(shape if keep_attn_out else (0,), dtype=torch.float32)
    if not out.numel():
        return out, lse, attn_out
    gate, residual = expanded(call.gate, shape), readable(residual)
    epilogue = Epilogue(
        readable(call.sinks),
        None if gate is None else problem.gate_operand(gate),
        None if residual is None else problem.query_operand(residual),
    )
    outputs = Outputs(out, lse if softmax else None, attn_out if keep_attn_out else None)
    chosen, of_splits, partials = problem.tiles("forward"), problem.splits, None
    split_kv = of_splits.split_kv
    if split_kv:
        count = problem.num_partials(split_kv)
        partials = Partials(
            k.new_empty((count, *shape[1:]), dtype=torch.float32),
            k.new_empty((count, *shape[1:-1], 2), dtype=torch.float32),
        )
    options, gate_options = problem.variant_options, problem.gate_options()
    problem.know(epilogue, gate_options, keep_attn_out)
    grid, tile_list, persistent = problem.query_programs(chosen.queries, problem.rows, of_splits)
    _run.start(
        attention_forward, grid,
        problem.queries_operand, problem.kv, problem.offsets, tile_list, epilogue, outputs, partials,
        *problem.sizes, problem.variant_inputs, SHAPE=problem.shape(chosen), VARIANT=options, GATE=gate_options,
        SPLIT_KV=split_kv, PERSISTENT=persistent, lead=k, tiles=chosen, known=problem.known,
        form=(split_kv, persistent, tile_list is None),
    )  # fmt: skip
    _start_short(problem, attention_forward_short, epilogue, outputs, GATE=gate_options)
    if split_kv:
        chosen = problem.tiles_of_partials(shape[-1], most_warps=4)
        _run.start(
            combine_partials, of_splits.combined * -(-problem.queries * problem.heads // chosen.queries),
            partials, epilogue, outputs, problem.offsets.kv, of_splits.split_rows, *problem.split_sizes(),
            HEADS=problem.heads, DV=shape[-1], LAYOUT=call.layout, VARIANT=options, GATE=gate_options,
            SPLIT_KV=split_kv, BLOCK_Q=chosen.queries, BLOCK_DV=chosen.keys,
            lead=k, tiles=chosen, known=problem.known, form=(split_kv, of_splits.split_rows is None),
        )  # fmt: skip
    return out, lse, attn_out


def _start_short(problem: Problem, kernel: Any, *operands: Any, **constants: Any) -> None:
    """Start a kernel of short rows, several to a program, where the layout has them."""
    chosen = problem.short_tiles(backward=kernel is attention_backward_short)
    if chosen is None or not problem.any_short():
        return
    rows, q_tokens, k_tokens, _, _, left, right, prefix = problem.sizes
    _run.start(
        kernel, -(-rows // (chosen.queries // chosen.keys)) * problem.kv_heads,
        problem.queries_operand, problem.kv, problem.offsets, *operands,
        rows, q_tokens, k_tokens, left, right, prefix, problem.variant_inputs,
        SHAPE=problem.short_shape(chosen), VARIANT=problem.variant_options, **constants,
        lead=problem.k, tiles=chosen, known=problem.known,
    )  # fmt: skip


def _start_whole(problem: Problem, *operands: Any) -> None:
    """Start the backward of whole rows, where the layout and the heads have it."""
    cell = problem.short_cell
    rows, q_tokens, k_tokens, _, _, left, right, prefix = problem.sizes
    for chosen in problem.whole_tiles:
        if problem.any_whole(cell, chosen.keys):
            _run.start(
                attention_backward_whole, rows * problem.kv_heads,
                problem.queries_operand, problem.kv, problem.offsets, *operands,
                rows, q_tokens, k_tokens, left, right, prefix, problem.variant_inputs,
                SHAPE=problem.whole_shape(cell, chosen), VARIANT=problem.variant_options,
                lead=problem.k, tiles=chosen, known=problem.known, form=(cell,),
            )  # fmt: skip
        cell = chosen.keys


def backward(
    call: AttentionCall, grad_out: Tensor, attn_out: Tensor, lse: Tensor, grad_lse: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Gradients of `q, k, v, gate`; an input that was not given has an empty one."""
    problem = Problem(call, backward=True, has_grad_lse=grad_lse is not None)
    if grad_lse is not None:
        grad_lse = resolved(grad_lse).contiguous()
        problem.variant_options = problem.variant_options._replace(grad_lse=True)
    # Without A, delta comes from the probabilities. The output would not do: a confident softmax shows its rounding.
    recompute_stats = problem.fp32_softmax or (problem.softmax and not attn_out.numel())
    grad_attn_out, delta, grad_gate = _through_epilogue(problem, readable(grad_out), attn_out, recompute_stats)
    if call.post_scale != 1:
        # Before the products with values, which then overflow less; inside the kernels it would cost registers.
        grad_attn_out = grad_attn_out * call.post_scale
    grad = problem.query_operand(grad_attn_out)
    # Behind a gate the epilogue's backward reads A, and makes delta of it.
    delta_from = attn_out if call.gate is None and problem.softmax and not recompute_stats else None
    sinks = readable(call.sinks)
    problem.know((grad, lse, delta_from, grad_lse, sinks))
    side = QuerySide(problem.queries_operand, grad, lse, delta, delta_from, grad_lse, sinks)
    grad_q = _grad_queries(problem, side, recompute_stats)
    grad_k, grad_v = _grad_keys(problem, side)
    _start_short(problem, attention_backward_short, grad, grad_lse, grad_q, grad_k, grad_v)
    _start_whole(problem, grad, lse if problem.softmax else None, grad_lse, grad_q, grad_k, grad_v)
    if problem.q_factor != 1:
        grad_q = grad_q * problem.q_factor
    if call.cos is not None and call.sin is not None and problem.kv.rope is None:
        tables, interleaved = (call.cos, call.sin), call.rope_interleaved
        grad_q = rotated(grad_q, problem.offsets.q, *tables, call.positions_q, interleaved, backwards=True)
        grad_k = rotated(grad_k, problem.offsets.kv, *tables, call.positions_k, interleaved, backwards=True)
    return grad_q, grad_k, grad_v, grad_gate, _grad_sinks(problem, side), *grad_biases(problem, side)


def _through_epilogue(
    problem: Problem, grad_out: Tensor, attn_out: Tensor, recompute_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of A, memory for delta (which is there behind a gate), and gradient of the gate."""
    call, shape, softmax = problem.call, problem.out_shape, problem.softmax
    delta = grad_out.new_empty((*shape[:-1], 2) if softmax and problem.any_longer() else (0,), dtype=torch.float32)
    gate = expanded(call.gate, shape)
    if gate is None or call.gate is None:
        return grad_out, delta, grad_out.new_empty(0)
    grad_attn_out = torch.empty_like(grad_out, memory_format=torch.contiguous_format)
    wide = padded(shape[-1])
    block = max(1, _TILE_NUMBERS // wide)
    grad_gate, over_tokens, over_channels = gate_sums(call.gate, shape, block)
    if grad_out.numel():
        _run.start(
            epilogue_backward, -(-problem.tokens // block) * problem.heads,
            problem.query_operand(grad_out), attn_out, problem.gate_operand(gate),
            grad_attn_out, delta if delta.numel() and not recompute_stats else None, grad_gate, problem.offsets.q,
            problem.rows, problem.tokens, problem.queries,
            HEADS=problem.heads, DV=shape[-1], LAYOUT=call.layout, GATE=problem.gate_options(),
            SUM_TOKENS=over_tokens, SUM_CHANNELS=over_channels, BLOCK_T=block, BLOCK_DV=wide,
            lead=grad_out, tiles=Tiles(block, wide, 8, 1),
        )  # fmt: skip
    grad_gate = gate_gradient(call.gate, grad_gate, shape)
    return grad_attn_out, delta, grad_gate


def _start_queries(problem: Problem, side: QuerySide, out: Tensor, kind: GradPass, groups: _Groups | None) -> None:
    """Start a backward pass over the queries, into `out`; `groups` for gradients of shared queries."""
    k, chosen = problem.k, problem.tiles("grad_queries")
    of_splits = problem.splits if groups is None and (kind.gradient or kind.fp32_softmax) else Splits(0)
    split_kv, partials = of_splits.split_kv, None
    if split_kv:
        partials = out.new_empty((problem.num_partials(split_kv), *out.shape[1:]), dtype=torch.float32)
    count, rows_of_group, key_shards = groups or (problem.rows, 1, 1)
    grid, tile_list, persistent = problem.query_programs(chosen.queries, count * key_shards, of_splits)
    _run.start(
        attention_grad_queries, grid,
        side, problem.kv, problem.offsets, tile_list, out, partials, *problem.sizes, rows_of_group, key_shards,
        problem.variant_inputs, SHAPE=problem.shape(chosen), VARIANT=problem.variant_options, PASS=kind,
        SPLIT_KV=split_kv, PERSISTENT=persistent, lead=k, tiles=chosen, known=problem.known,
        form=(kind, split_kv, persistent, tile_list is None),
    )  # fmt: skip
    if split_kv:
        chosen = problem.tiles_of_partials(out.shape[-1], most_warps=8)
        _run.start(
            add_partials, of_splits.combined * -(-problem.queries * problem.heads // chosen.queries),
            partials, out, problem.offsets.kv, of_splits.split_rows, *problem.split_sizes(),
            HEADS=problem.heads, C=out.shape[-1], SPLIT_KV=split_kv, BLOCK_Q=chosen.queries, BLOCK_C=chosen.keys,
            lead=k, tiles=chosen, known=problem.known, form=(kind, split_kv, of_splits.split_rows is None),
        )  # fmt: skip


def _grad_queries(problem: Problem, side: QuerySide, recompute_stats: bool) -> Tensor:
    """dQ; for shared queries summed over groups of rows and shards of their keys, and then over all of them.

    Statistics are made on the way where a program has all keys of its queries, else by a pass before.
    """
    q, stats = problem.q, side.delta.numel() > 0
    for_stats = GradPass(problem.fp32_softmax, False, not recompute_stats)
    for_gradient = GradPass(problem.fp32_softmax, gradient=True, only_large_lse=False)
    if stats and problem.call.layout == "packed":
        for_gradient = for_stats._replace(gradient=True, with_stats=True)
    elif stats:
        _start_queries(problem, side, side.delta, for_stats, None)
    if problem.call.layout != "shared":
        grad_q = q.new_empty(q.shape)
        if grad_q.numel():
            _start_queries(problem, side, grad_q, for_gradient, None)
        return grad_q
    row_groups, key_shards = splits.row_groups(problem.call)
    sums = q.new_empty((row_groups * key_shards, *q.shape), dtype=torch.float32)
    if sums.numel():
        groups = _Groups(row_groups, -(-problem.rows // row_groups), key_shards)
        _start_queries(problem, side, sums, for_gradient, groups)
    return sums.sum(0).to(q.dtype)


def _grad_keys(problem: Problem, side: QuerySide) -> tuple[Tensor, Tensor]:
    """dK and dV; an empty dV where values are keys."""
    k, v, chosen = problem.k, problem.v, problem.tiles("grad_keys")
    grad_k = k.new_empty(k.shape)
    grad_v = v.new_empty(v.shape if problem.call.v is not None else (0,))
    if k.shape[0]:
        grid, tile_list, persistent = problem.key_programs(chosen.keys)
        _run.start(
            attention_grad_keys, grid,
            side, problem.kv, problem.offsets, tile_list, grad_k, grad_v, *problem.sizes, problem.variant_inputs,
            SHAPE=problem.shape(chosen), VARIANT=problem.variant_options, FP32_SOFTMAX=problem.fp32_softmax,
            PERSISTENT=persistent, lead=k, tiles=chosen, known=problem.known, form=(persistent, tile_list is None),
        )  # fmt: skip
    return grad_k, grad_v


def _grad_sinks(problem: Problem, side: QuerySide) -> Tensor:
    """The gradient of the sinks, summed over blocks of query tokens, and then over these in order; empty without."""
    if side.sinks is None:
        return problem.k.new_empty((0,), dtype=torch.float32)
    blocks = -(-problem.tokens // _SINK_TOKENS)
    sums = torch.zeros((blocks, problem.heads), dtype=torch.float32, device=problem.k.device)
    if side.delta.numel():
        _run.start(
            sinks_backward, blocks * problem.heads,
            side.lse, side.delta, side.grad_lse, side.sinks, sums, problem.offsets.q, problem.rows, problem.tokens,
            HEADS=problem.heads, LAYOUT=problem.call.layout, FP32_SOFTMAX=problem.fp32_softmax, BLOCK_T=_SINK_TOKENS,
            lead=problem.k, tiles=Tiles(_SINK_TOKENS, 1, 4, 1),
        )  # fmt: skip
    return sums.sum(0)
