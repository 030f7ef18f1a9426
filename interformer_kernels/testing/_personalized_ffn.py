"""The cases, inputs, definition and reach of `personalized_ffn`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interformer_kernels import reference
from interformer_kernels._calls import FFN_ACTIVATIONS, FfnCall
from interformer_kernels.testing.case import ALL_EMPTY, HARD_LENGTHS, NO_ROWS, TILE_EDGES, Case
from interformer_kernels.testing.draw import Draw, Made
from interformer_kernels.testing.reach import Reach, rows_of


def cases(op: str) -> list[Case]:
    """The op's share of the grid."""
    grid = [Case(op, f"{act}, bias, residual", residual=True, options={"activation": act}) for act in FFN_ACTIVATIONS]
    grid += [Case(op, "plain", bias=False), Case(op, "tile edges", lengths=TILE_EDGES)]
    grid += [Case(op, "all rows empty", lengths=ALL_EMPTY), Case(op, "no rows", lengths=NO_ROWS)]
    grid += [Case(op, "odd sizes, strided", head_size=7, value_size=10, strided=True, index_dtype=torch.int32)]
    return grid


def hard_cases(op: str) -> list[Case]:
    """The calls into which values are planted."""
    options = {"activation": "gelu"}
    return [Case(op, "ffn", lengths=HARD_LENGTHS, head_size=8, value_size=6, residual=True, options=options)]


def hard_value_cases(op: str, sizes: dict[str, Any]) -> list[Case]:
    """The calls that are made of hard numbers."""
    kinds: list[dict[str, Any]] = [{"activation": activation} for activation in ("relu", "silu", "gelu")]
    return [Case(op, "inputs of 1e-3", **sizes, options=options) for options in kinds]


def make_inputs(draw: Draw, case: Case, offsets: Tensor) -> Made:
    """The op's arguments."""
    rows, batch = sum(case.lengths), len(case.lengths)
    shape = (rows + case.tail, case.value_size)
    inputs = {"x": draw.leaf(shape[0], case.head_size, rows=rows), "offsets": offsets}
    inputs["weight"] = draw.leaf(batch, case.head_size, case.value_size)
    if case.bias:
        inputs["bias"] = draw.leaf(batch, case.value_size)
    if case.residual:
        inputs["residual"] = draw.leaf(*shape, rows=rows)
    return inputs, shape, rows


def call_eager(op: str, inputs: Mapping[str, Any]) -> tuple[Tensor, None]:
    """The definition."""
    given = {"bias": None, "activation": "identity", **inputs}
    return reference.personalized_ffn(FfnCall(*map(given.__getitem__, FfnCall._fields)), given.get("residual")), None


def reach(inputs: Mapping[str, Any], name: str, place: tuple[int, ...]) -> Reach:
    """The numbers that may notice a value at one place of an input."""
    x, weight, grad = inputs["x"], inputs["weight"], inputs["grad_out"]
    rows = rows_of(inputs["offsets"], len(x))
    of_row = name in ("weight", "bias")
    row = torch.tensor(place[0]) if of_row else rows[place[0]]
    tokens = (rows == row) if of_row else torch.arange(len(x)) == place[0]
    tokens = tokens & (rows >= 0)
    this_row = (torch.arange(len(weight)) == row) & (name != "residual")
    forward, backward = name != "grad_out", name != "residual"
    reached = {
        "out": (tokens & forward)[:, None].expand_as(grad),
        "dx": (tokens & backward)[:, None].expand_as(x),
        "dweight": this_row[:, None, None].expand_as(weight),
    }
    if inputs.get("bias") is not None:
        reached["dbias"] = this_row[:, None].expand_as(inputs["bias"])
    if inputs.get("residual") is not None:
        reached["dresidual"] = (tokens & (name == "grad_out"))[:, None].expand_as(grad)
    return reached
