"""Calls of the registered ops, as the dispatcher sees them, and a function that makes one of each op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import interformer_kernels as ik
from interformer_kernels import testing
from interformer_kernels.testing import Case


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments with which the registered ops are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "interformer_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded_calls(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> list[tuple[Any, tuple[Any, ...]]]:
    """The forward and backward op calls that the case makes, and those of ops that move tokens around them."""
    inputs = testing.make_inputs(case, dtype)
    with Recorder() as recorder:
        testing.evaluate(lambda: testing.call(case.op, inputs, backend), case.op, inputs)
    assert sum(func.name().endswith(("_fwd", "_bwd")) for func, _ in recorder.calls) == 2
    return [(func, tuple(x.detach() if isinstance(x, Tensor) else x for x in args)) for func, args in recorder.calls]


def all_ops_at_once(x: Tensor, weight: Tensor, offsets: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """All five ops in one function of packed tokens `x [T, 8]`."""
    heads = x.unflatten(1, (2, 4))
    y = ik.jagged_attention(heads, heads, heads, offsets, causal=True, rope=rope, gate=heads, residual=heads)
    z = ik.apply_rotary(heads, offsets, rope)
    pooled = ik.pma_pooling(heads[:0].new_ones(2, 2, 4), z, None, offsets)
    crossed = ik.gated_cross_attention(pooled, y, heads, offsets, gate=pooled)
    ffn = ik.personalized_ffn(y.flatten(1), weight.expand(offsets.shape[0] - 1, 8, 8), offsets, activation="silu")
    return crossed.sum() + ffn.square().sum()
