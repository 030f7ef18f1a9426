"""Calls of the CPU kernels for their tests, and comparisons of the results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from interformer_kernels import testing

# Each of the three layouts of the queries, which decide the axes of a kernel's sums, with its own or the keys' offsets.
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"op": "jagged_attention", "name": "self"},
    {"op": "jagged_attention", "name": "cross", "query_lengths": True},
    {"op": "gated_cross_attention", "name": "dense"},
    {"op": "gated_cross_attention", "name": "jagged", "query_lengths": True},
    {"op": "pma_pooling", "name": "shared"},
)
# Slices of wider tensors along the channels, heads before tokens, every other token, every other channel.
MEMORY_LAYOUTS = ("sliced", "transposed", "spread", "channels apart")


def layouts(lengths: tuple[int, ...], **sizes: Any) -> list[testing.Case]:
    """One case of each layout; queries with offsets of their own have the keys' lengths in reversed order."""
    cases = [testing.Case(**{**layout, "lengths": lengths, **sizes}) for layout in LAYOUTS]
    reversed_lengths = {"query_lengths": lengths[::-1]}
    return [testing.Case(**{**vars(case), **reversed_lengths}) if case.query_lengths else case for case in cases]


def all_ops(lengths: tuple[int, ...], **sizes: Any) -> list[testing.Case]:
    """One case of each layout of the attention family, and one of each other op."""
    other_ops = (
        ("personalized_ffn", {"residual": True, "options": {"activation": "gelu"}}),
        ("apply_rotary", {"rope": 6}),
        ("jagged_softmax", {}),
        ("jagged_weighted_sum", {}),
    )
    return layouts(lengths, **sizes) + [
        testing.Case(op, "tokens", lengths=lengths, **{**sizes, **options}) for op, options in other_ops
    ]


def name_of(case: testing.Case) -> str:
    """A readable id."""
    return f"{case.op}-{case.name}"


def results(op: str, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients of the CPU kernels, by name."""
    return testing.evaluate(lambda: testing.call(op, inputs, "cpu"), op, inputs)


def truth(op: str, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same of the definition, in the inputs' own dtype."""
    return testing.evaluate(lambda: testing.call_eager(op, inputs), op, inputs)


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor: -0 and 0 differ, equal NaNs do not."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of the quantities whose bits are not the same."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].shape != b[name].shape or not torch.equal(bits(a[name]), bits(b[name]))]


def replaced(inputs: Mapping[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """The inputs with `change(name, x)` of every floating tensor but gradients of outputs, as leaves."""
    changed = dict(inputs)
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.is_floating_point() and name not in ("grad_out", "grad_lse"):
            changed[name] = change(name, x.detach()).requires_grad_(x.requires_grad)
    return changed


def relaid(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides, one of MEMORY_LAYOUTS, with NaN in the gaps."""
    if x.dim() < 2:
        return x
    hole = torch.full_like(x, torch.nan)
    if layout == "sliced":
        return torch.cat((hole, x, hole), -1)[..., x.shape[-1] : 2 * x.shape[-1]]
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.stack((x, hole), 1)[:, 0] if layout == "spread" else torch.stack((x, hole), -1)[..., 0]


def relaid_inputs(inputs: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """The inputs with all floating tensors relaid."""
    changed = replaced(inputs, lambda name, x: relaid(x, layout))
    for name in ("grad_out", "grad_lse"):
        if name in inputs:
            changed[name] = relaid(inputs[name], layout)
    if "rope" in inputs:
        changed["rope"] = tuple(relaid(x, layout) for x in inputs["rope"])
    return changed


def broadcast_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All shapes that broadcast to `shape`, of its rank and below."""
    shapes = []
    for rank in range(len(shape) + 1):
        tail = shape[len(shape) - rank :]
        for broadcast in itertools.product((False, True), repeat=rank):
            shapes.append(tuple(1 if is_one else n for is_one, n in zip(broadcast, tail, strict=True)))
    return shapes
