"""The bench's workloads: each op's inputs, its definition in eager PyTorch, and this package's implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from interformer_bench.ops.call import Inputs, OpFunction, Sizes, key_offsets
from interformer_bench.ops.table import TABLE
from torch import Tensor

import interformer_kernels
from interformer_kernels import testing

__all__ = [
    "DIFFERENTIABLE",
    "OPS",
    "Inputs",
    "OpFunction",
    "Sizes",
    "definition",
    "forward",
    "inputs",
    "kernel_of",
    "key_offsets",
    "ours",
    "training",
]

OPS = tuple(TABLE)
DIFFERENTIABLE = {
    **testing.DIFFERENTIABLE,
    **{name: op.composed.differentiable for name, op in TABLE.items() if op.composed is not None},
}


def inputs(
    op: str, lengths: Sequence[int], sizes: Sizes, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """The arguments of one call on rows of these lengths, with gradient leaves, and its `grad_out`."""
    spec = TABLE[op]
    if spec.composed is not None:
        return spec.composed.inputs(lengths, sizes, dtype, device, seed)
    case = testing.Case(
        op,
        "bench",
        lengths=tuple(lengths),
        tail=0,
        queries=sizes.queries,
        heads=sizes.heads,
        kv_heads=sizes.heads,
        head_size=sizes.head_size,
        value_size=sizes.width if spec.has_width else sizes.head_size,
        gate="full" if sizes.gated else "",
        residual=sizes.gated,
        rope=sizes.head_size if spec.rotates else 0,
    )
    return testing.make_inputs(case, dtype, device, seed)


# ---------------------------------------------------------------- the definition, and this package's implementation


def definition(op: str, arguments: Inputs) -> Tensor:
    """The output of the definition, in the dtype of the arguments."""
    composed = TABLE[op].composed
    if composed is None:
        return testing.call_eager(op, arguments)[0]
    return composed.definition(**{name: x for name, x in arguments.items() if name != "grad_out"})


def ours(op: str, backend: str | None = None) -> OpFunction:
    """This package's implementation of the op."""
    composed = TABLE[op].composed
    if composed is not None:
        return composed.ours(backend)

    def public(**arguments: Any) -> Tensor:
        out = getattr(interformer_kernels, op)(**arguments, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return public


def kernel_of(op: str) -> str:
    """The op of this package whose kernel does the work."""
    return TABLE[op].kernel


# ---------------------------------------------------------------- the two passes


def forward(function: OpFunction, arguments: Inputs) -> Tensor:
    """The output without gradients, as in inference."""
    with torch.no_grad():
        return function(**{name: x for name, x in arguments.items() if name != "grad_out"})


def training(op: str, function: OpFunction, arguments: Inputs) -> dict[str, Tensor]:
    """The output and every gradient, as in training."""
    names = [name for name in DIFFERENTIABLE[op] if arguments.get(name) is not None]
    out = function(**{name: x for name, x in arguments.items() if name != "grad_out"})
    grads = torch.autograd.grad(out, [arguments[name] for name in names], arguments["grad_out"])
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(names, grads, strict=True)}}
