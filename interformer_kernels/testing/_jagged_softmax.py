"""The cases, inputs, definition and reach of `jagged_softmax`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interformer_kernels import reference
from interformer_kernels._calls import SoftmaxCall
from interformer_kernels.testing.case import ALL_EMPTY, HARD_LENGTHS, NO_ROWS, ONE_GIANT, TILE_EDGES, Case
from interformer_kernels.testing.draw import Draw, Made
from interformer_kernels.testing.reach import Reach, rows_of


def cases(op: str) -> list[Case]:
    """The op's share of the grid."""
    grid = [Case(op, f"heads of {heads}", heads=heads) for heads in (1, 4, 40)]
    grid += [Case(op, "tile edges", lengths=TILE_EDGES, heads=2), Case(op, "one giant", lengths=ONE_GIANT, heads=1)]
    grid += [Case(op, "all rows empty", lengths=ALL_EMPTY), Case(op, "no rows", lengths=NO_ROWS)]
    grid += [Case(op, "strided", heads=6, strided=True, index_dtype=torch.int32)]
    return grid


def hard_cases(op: str) -> list[Case]:
    """The calls into which values are planted."""
    return [Case(op, f"softmax of {heads}", lengths=HARD_LENGTHS, heads=heads) for heads in (2, 3)]


def hard_value_cases(op: str, sizes: dict[str, Any]) -> list[Case]:
    """The calls that are made of hard numbers."""
    return [Case(op, name, **sizes) for name in ("scores of -inf", "scores of tens")]


def make_inputs(draw: Draw, case: Case, offsets: Tensor) -> Made:
    """The op's arguments."""
    rows = sum(case.lengths)
    shape = (rows + case.tail, case.heads)
    return {"scores": draw.leaf(*shape, rows=rows), "offsets": offsets}, shape, rows


def call_eager(op: str, inputs: Mapping[str, Any]) -> tuple[Tensor, None]:
    """The definition."""
    return reference.jagged_softmax(SoftmaxCall(inputs["scores"], inputs["offsets"])), None


def reach(inputs: Mapping[str, Any], name: str, place: tuple[int, ...]) -> Reach:
    """The numbers that may notice a value at one place of an input: those of its row under its head."""
    scores = inputs["scores"]
    rows = rows_of(inputs["offsets"], len(scores))
    this_row = (rows == rows[place[0]]) & (rows >= 0)
    head = this_row[:, None] & (torch.arange(scores.shape[1]) == place[1])
    return {"out": head & (name == "scores"), "dscores": head}
