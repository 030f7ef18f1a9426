"""The counted calls; `python -m instructions.calls` makes them under callgrind.

Each entry is counted twice, the second time with more work, so that what surrounds the calls cancels.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import interformer_kernels as ik
from instructions import callgrind

# Calls and rows of the first count (the second has twice as many), and calls of many rows.
CALLS, ROWS, ROW_CALLS = 10, 64, 2
_HEADS, _SIZE, _QUERIES = 4, 16, 2
OPS = ("jagged_attention", "gated_cross_attention", "pma_pooling", "personalized_ffn")
PASSES = ("forward", "forward and backward")


Run = Callable[[], None]


def names() -> list[tuple[str, int]]:
    """The name of each entry, and the number of calls or rows by which its second run exceeds the first."""
    counted = ("a call", CALLS), ("a row of 4 tokens", ROWS * ROW_CALLS)
    return [(f"{op}, {direction}: {what}", more) for op in OPS for direction in PASSES for what, more in counted]


def entries() -> Iterator[tuple[Run, Run]]:
    """The two runs of each entry, in the order of `names`."""
    for op in OPS:
        for direction in PASSES:
            small = (20,) if op == "jagged_attention" else (10, 10)
            one, few, many = (_call(op, direction, lengths) for lengths in (small, (4,) * ROWS, (4,) * 2 * ROWS))
            yield _repeated(one, CALLS), _repeated(one, 2 * CALLS)
            yield _repeated(few, ROW_CALLS), _repeated(many, ROW_CALLS)


def _repeated(call: Run, times: int) -> Run:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def _call(op: str, direction: str, lengths: tuple[int, ...]) -> Run:
    """One call of an op at the sizes of InterFormer on rows of these lengths, on the CPU kernels."""
    rows, tokens = len(lengths), sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    trains = direction != PASSES[0]

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).requires_grad_(trains)

    x, k, v = (leaf(tokens, _HEADS, _SIZE) for _ in range(3))
    function: Callable[[], Any]
    if op == "jagged_attention":
        leaves = [x, k, v]
        function = partial(ik.jagged_attention, x, k, v, offsets, backend="cpu")
    elif op == "gated_cross_attention":
        query, gate, residual = (leaf(rows, _QUERIES, _HEADS, _SIZE) for _ in range(3))
        leaves = [query, k, v, gate, residual]
        function = partial(ik.gated_cross_attention, query, k, v, offsets, gate=gate, residual=residual, backend="cpu")
    elif op == "pma_pooling":
        seeds = leaf(_QUERIES, _HEADS, _SIZE)
        leaves = [seeds, k, v]
        function = partial(ik.pma_pooling, seeds, k, v, offsets, backend="cpu")
    else:
        flat, weight, bias = leaf(tokens, 64), leaf(rows, 64, 64), leaf(rows, 64)
        leaves = [flat, weight, bias]
        function = partial(ik.personalized_ffn, flat, weight, offsets, bias=bias, backend="cpu")
    with torch.no_grad():
        grad_out = torch.ones_like(function())

    def forward() -> None:
        with torch.no_grad():
            function()

    def backward() -> None:
        torch.autograd.grad(function(), leaves, grad_out)

    return backward if trains else forward


def main() -> None:
    """The counted process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    runs = [run for pair in entries() for run in pair]
    for run in (*runs, *runs):
        run()
    gc.collect()
    gc.disable()
    callgrind.wait_for_start()
    for run in runs:  # once more, for counting changes what the first calls meet
        run()
    for run in runs:
        callgrind.mark()
        run()
    callgrind.mark()


if __name__ == "__main__":
    main()
