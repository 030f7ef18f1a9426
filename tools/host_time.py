"""CPU time of eager calls on the Triton backend, without a GPU: `python tools/host_time.py [op...]`.

A fake driver compiles kernels and starts nothing, so the time is the host's alone: checks, autograd, the backend's
adapter and launches. The smallest mean of many bursts is printed, in microseconds, of a forward without gradients and
of a forward with its backward.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import fake_triton_driver
import torch
from torch import Tensor

import interformer_kernels as ik
from interformer_kernels import testing

OFFSETS = testing.offsets_of((104,) * 8)
_WARM_UP, _BURSTS = 20, 150


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()


def call_of(op: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A call of InterFormer's sizes, and its leaves."""
    tokens = int(OFFSETS[-1])
    x, k, v = (leaf(tokens, 4, 16) for _ in range(3))
    if op == "apply_rotary":
        tables = torch.randn(2, 200, 8).unbind(0)
        return lambda: ik.apply_rotary(x, OFFSETS, tables, backend="triton"), [x]
    if op == "personalized_ffn":
        x, weight, bias = leaf(tokens, 64), leaf(8, 64, 64), leaf(8, 64)
        return lambda: ik.personalized_ffn(x, weight, OFFSETS, bias=bias, backend="triton"), [x, weight, bias]
    if op == "jagged_softmax":
        scores = leaf(tokens, 4)
        return lambda: ik.jagged_softmax(scores, OFFSETS, backend="triton"), [scores]
    if op == "jagged_weighted_sum":
        weights = leaf(tokens, 4)
        return lambda: ik.jagged_weighted_sum(weights, v, OFFSETS, backend="triton"), [weights, v]
    queries = {"pma_pooling": (2, 4, 16), "gated_cross_attention": (8, 2, 4, 16), "jagged_attention": tuple(x.shape)}
    q, function = leaf(*queries[op]), getattr(ik, op)
    return lambda: function(q, k, v, OFFSETS, backend="triton"), [q, k, v]


def microseconds(function: Callable[[], Any], calls: int) -> float:
    """CPU time of a call: the smallest mean over bursts of so many calls."""
    for _ in range(_WARM_UP):
        function()
    gc.collect()
    gc.disable()
    bursts = []
    for _ in range(_BURSTS):
        start = time.process_time()
        for _ in range(calls):
            function()
        bursts.append((time.process_time() - start) / calls * 1e6)
    gc.enable()
    return min(bursts)


def main(ops: list[str]) -> None:
    """Print the times of these ops, or of all."""
    fake_triton_driver.install("sm_90")
    ik.set_validation("off")
    torch.set_num_threads(1)
    for op in ops or testing.OPS:
        function, leaves = call_of(op)
        with torch.no_grad():
            forward = microseconds(function, 20)
        grad = torch.randn_like(function())
        both = microseconds(lambda: torch.autograd.grad(function(), leaves, grad), 10)  # noqa: B023 (called at once)
        print(f"{op:24}forward {forward:6.1f} us   forward+backward {both:6.1f} us", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
