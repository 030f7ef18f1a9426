"""The cases, inputs, definition and reach of `jagged_weighted_sum`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interformer_kernels import reference
from interformer_kernels._calls import WeightedSumCall
from interformer_kernels.testing.case import ALL_EMPTY, HARD_LENGTHS, NO_ROWS, ONE_GIANT, TILE_EDGES, Case
from interformer_kernels.testing.draw import Draw, Made
from interformer_kernels.testing.reach import Reach, rows_of


def cases(op: str) -> list[Case]:
    """The op's share of the grid."""
    grid = [
        Case(op, f"{heads} heads of {channels}", heads=heads, head_size=channels)
        for heads, channels in ((1, 64), (4, 16), (3, 7), (2, 100))
    ]
    grid += [Case(op, "tile edges", lengths=TILE_EDGES, heads=2), Case(op, "one giant", lengths=ONE_GIANT, heads=1)]
    grid += [Case(op, "all rows empty", lengths=ALL_EMPTY), Case(op, "no rows", lengths=NO_ROWS)]
    grid += [Case(op, "strided", heads=3, head_size=10, strided=True, index_dtype=torch.int32)]
    return grid


def hard_cases(op: str) -> list[Case]:
    """The calls into which values are planted."""
    return [Case(op, "weighted sum", lengths=HARD_LENGTHS, heads=2, head_size=6)]


def hard_value_cases(op: str, sizes: dict[str, Any]) -> list[Case]:
    """The calls that are made of hard numbers."""
    return [Case(op, "inputs of 1e-3", **sizes)]


def make_inputs(draw: Draw, case: Case, offsets: Tensor) -> Made:
    """The op's arguments."""
    rows, sizes = sum(case.lengths), (case.heads, case.head_size)
    tokens = rows + case.tail
    inputs = {"weights": draw.leaf(tokens, case.heads, rows=rows), "v": draw.leaf(tokens, *sizes, rows=rows)}
    return {**inputs, "offsets": offsets}, (len(case.lengths), *sizes), None


def call_eager(op: str, inputs: Mapping[str, Any]) -> tuple[Tensor, None]:
    """The definition."""
    return reference.jagged_weighted_sum(WeightedSumCall(*map(inputs.__getitem__, WeightedSumCall._fields))), None


def reach(inputs: Mapping[str, Any], name: str, place: tuple[int, ...]) -> Reach:
    """The numbers that may notice a value at one place of an input."""
    v, grad = inputs["v"], inputs["grad_out"]
    rows = rows_of(inputs["offsets"], len(v))
    row = torch.tensor(place[0]) if name == "grad_out" else rows[place[0]]
    held = (rows == row) & (rows >= 0)
    tokens = held if name == "grad_out" else held & (torch.arange(len(v)) == place[0])
    head = torch.arange(v.shape[1]) == place[1]
    channel = torch.arange(v.shape[2]) == place[2] if len(place) > 2 else torch.ones(v.shape[2], dtype=torch.bool)
    here = head[:, None] & channel
    this_row = torch.arange(len(grad)) == row
    return {
        "out": this_row[:, None, None] & here & (name != "grad_out"),
        "dweights": tokens[:, None] & head & (name != "weights"),
        "dv": tokens[:, None, None] & here & (name != "v"),
    }
