"""The cases, inputs, definition and reach of `apply_rotary`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interformer_kernels import reference
from interformer_kernels._calls import RotaryCall
from interformer_kernels.testing.case import ALL_EMPTY, HARD_LENGTHS, Case
from interformer_kernels.testing.draw import Draw, Made
from interformer_kernels.testing.reach import Reach, at, rows_of


def cases(op: str) -> list[Case]:
    """The op's share of the grid."""
    shapes: list[dict[str, Any]] = [
        {},
        {"rope": 10},
        {"positions": True},
        {"lengths": ALL_EMPTY},
        {"strided": True},
    ]
    grid = []
    for interleaved in (False, True):
        for extra in shapes:
            name = ", ".join(["interleaved" if interleaved else "halves", *map(str, extra)])
            grid.append(Case(op, name, **{"rope": 16, **extra, "options": {"interleaved": interleaved}}))
    return grid


def hard_cases(op: str) -> list[Case]:
    """The calls into which values are planted."""
    return [Case(op, "rotary", lengths=HARD_LENGTHS, heads=2, head_size=8, rope=6)]


def hard_value_cases(op: str, sizes: dict[str, Any]) -> list[Case]:
    """None: a rotation neither cancels nor overflows."""
    return []


def make_inputs(draw: Draw, case: Case, offsets: Tensor) -> Made:
    """The op's arguments."""
    rows = sum(case.lengths)
    shape = (rows + case.tail, case.heads, case.head_size)
    inputs = {"x": draw.leaf(*shape, rows=rows), "offsets": offsets, "rope": draw.tables()}
    if case.positions:
        inputs["positions"] = draw.positions(shape[0])
    return inputs, shape, rows


def call_eager(op: str, inputs: Mapping[str, Any]) -> tuple[Tensor, None]:
    """The definition."""
    given = {"positions": None, "interleaved": False, **inputs}
    given["cos"], given["sin"] = given["rope"]
    return reference.apply_rotary(RotaryCall(*map(given.__getitem__, RotaryCall._fields))), None


def reach(inputs: Mapping[str, Any], name: str, place: tuple[int, ...]) -> Reach:
    """The numbers that may notice a value at one place of an input."""
    x = inputs["x"]
    held = rows_of(inputs["offsets"], len(x))[place[0]] >= 0
    head = (at(x, place) & held).any(-1, keepdim=True).expand_as(x)
    nothing = torch.zeros_like(head)
    return {"out": head if name == "x" else nothing, "dx": head if name == "grad_out" else nothing}
