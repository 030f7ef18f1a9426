"""Launch of the gradients of the tables of biases, and the end of their sums."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels._triton import _run
from interformer_kernels._triton._arguments import QuerySide
from interformer_kernels._triton._attention_biases import attention_grad_biases
from interformer_kernels._triton._attention_problem import Problem
from interformer_kernels._triton._rows import slots

_MOST_PROGRAMS = 1024
_MOST_SUMS = 2**25  # numbers of the tables of all programs: 128 MiB


def grad_biases(problem: Problem, side: QuerySide) -> tuple[Tensor, Tensor]:
    """Gradients of the position bias and of the time bias; an empty one for a table that is not given."""
    call, k, heads = problem.call, problem.k, problem.heads
    position, time = call.position_bias, call.time_bias
    if position is None and time is None:
        return k.new_empty((0,), dtype=torch.float32), k.new_empty((0,), dtype=torch.float32)
    chosen = problem.tiles("grad_biases")
    queries, keys = chosen.queries, chosen.keys
    distances, bins = 0 if position is None else position.shape[1], 0 if time is None else time.shape[1]
    most = min(_MOST_PROGRAMS, _MOST_SUMS // (queries * (distances + 2) + bins * queries * keys)) // heads
    number = slots(problem.tokens, problem.rows, 1, queries)
    if call.layout != "packed":
        number = problem.rows * -(-problem.queries // queries)
    groups = max(1, min(number, most))

    def zeros(*shape: int) -> Tensor:
        return torch.zeros((groups, heads, *shape), dtype=torch.float32, device=k.device)

    of_positions, of_ends, of_times = zeros(queries, distances), zeros(queries, 2), zeros(bins, queries * keys)
    rows, q_tokens, k_tokens, row_queries, _, left, right, prefix = problem.sizes
    if problem.tokens and problem.k_tokens:
        _run.start(
            attention_grad_biases, groups * heads,
            side, problem.kv, problem.offsets, of_positions, of_ends, of_times,
            rows, q_tokens, k_tokens, row_queries, left, right, prefix, number, problem.variant_inputs,
            SHAPE=problem.shape_of_one_head(chosen), VARIANT=problem.variant_options,
            FP32_SOFTMAX=problem.fp32_softmax, HEADS=heads, lead=k, tiles=chosen,
        )  # fmt: skip
    grad_position, grad_time = of_positions.sum((0, 2)), of_times.sum((0, 3))
    if distances:
        before, behind = of_ends.sum((0, 2)).unbind(-1)
        grad_position[:, 0] += before
        grad_position[:, -1] += behind
    grads = []
    for table, grad in ((position, grad_position), (time, grad_time)):
        if table is None:
            grad = grad.new_empty(0)
        elif table.shape[0] < heads:
            grad = grad.sum(0, keepdim=True)
        grads.append(grad)
    return grads[0], grads[1]
