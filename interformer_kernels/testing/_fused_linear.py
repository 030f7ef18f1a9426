"""The cases, inputs and definition of `fused_linear`, whose tokens belong to no rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from interformer_kernels import reference
from interformer_kernels._calls import LINEAR_ACTIVATIONS, LinearCall
from interformer_kernels.testing.case import Case
from interformer_kernels.testing.draw import Draw, Made


def cases(op: str) -> list[Case]:
    """Every option once, sizes on both sides of vectors, panels and blocks of tokens, and no tokens."""
    wide: dict[str, Any] = {"head_size": 64, "value_size": 96}
    grid = [
        Case(op, f"{activation}, norm, gate, residual", norm=True, gate="full", residual=True, **_options(activation))
        for activation in LINEAR_ACTIVATIONS
    ]
    grid += [Case(op, "plain", bias=False), Case(op, "bias", lengths=(1,)), Case(op, "residual", residual=True)]
    grid += [
        Case(op, "norm", norm=True, bias=False, lengths=(300,), **wide),
        Case(op, "no tokens", lengths=(), norm=True),
    ]
    grid += [Case(op, "gate", gate="full", lengths=(97,), **wide), Case(op, "silu", lengths=(200,), **_options("silu"))]
    grid += [Case(op, "blocks", norm=True, lengths=(4500,), head_size=24, value_size=20)]
    odd: dict[str, Any] = {"head_size": 7, "value_size": 10, "gate": "full", "residual": True, "norm": True}
    grid += [Case(op, "odd sizes", **odd), Case(op, "odd sizes, strided", strided=True, **odd, **_options("gelu"))]
    grid += [Case(op, "strided", strided=True, residual=True, **wide)]
    return [_without_tail(case) for case in grid]


def _options(activation: str) -> dict[str, Any]:
    return {"options": {"activation": activation}}


def _without_tail(case: Case) -> Case:
    return Case(**{**vars(case), "tail": 0})


def make_inputs(draw: Draw, case: Case, offsets: Tensor) -> Made:
    """The op's arguments."""
    tokens, width = sum(case.lengths), case.head_size
    shape = (tokens, case.value_size)
    inputs = {"x": draw.leaf(tokens, width), "weight": draw.leaf(case.value_size, width)}
    if case.bias:
        inputs["bias"] = draw.leaf(case.value_size)
    if case.norm:
        inputs["norm_weight"], inputs["norm_bias"] = draw.leaf(width), draw.leaf(width)
    if case.gate:
        inputs["gate"] = draw.leaf(tokens, width)
    if case.residual:
        inputs["residual"] = draw.leaf(*shape)
    return inputs, shape, None


def call_eager(op: str, inputs: Mapping[str, Any]) -> tuple[Tensor, None]:
    """The definition."""
    given = {**dict.fromkeys(LinearCall._fields), "eps": 1e-5, "activation": "identity", **inputs}
    call = LinearCall(*map(given.__getitem__, LinearCall._fields))
    return reference.fused_linear(call, given.get("residual")), None
