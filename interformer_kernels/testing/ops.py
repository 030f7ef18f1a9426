"""The ops under test: a module for each family knows its cases, inputs and definition, and who may notice a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from interformer_kernels.testing import (
    _apply_rotary,
    _attention,
    _jagged_softmax,
    _jagged_weighted_sum,
    _personalized_ffn,
)
from interformer_kernels.testing.case import HARD_LENGTHS, HARD_SIZES, Case
from interformer_kernels.testing.draw import Draw, Made
from interformer_kernels.testing.reach import Reach

_MODULES: dict[str, Any] = {
    "jagged_attention": _attention,
    "pma_pooling": _attention,
    "gated_cross_attention": _attention,
    "apply_rotary": _apply_rotary,
    "personalized_ffn": _personalized_ffn,
    "jagged_softmax": _jagged_softmax,
    "jagged_weighted_sum": _jagged_weighted_sum,
}
OPS = tuple(_MODULES)


def cases(op: str) -> list[Case]:
    """The grid of small calls that every backend of `op` must get right; names are unique within an op."""
    grid: list[Case] = _MODULES[op].cases(op)
    return grid


def hard_cases(op: str) -> list[Case]:
    """The calls into which values are planted."""
    grid: list[Case] = _MODULES[op].hard_cases(op)
    return grid


def hard_value_cases(op: str) -> list[Case]:
    """The calls that are made of hard numbers; their names are those of HARD_VALUES with the case's other options."""
    grid: list[Case] = _MODULES[op].hard_value_cases(op, {**HARD_SIZES, "lengths": 3 * HARD_LENGTHS})
    return grid


def make_arguments(draw: Draw, case: Case, offsets: Tensor) -> Made:
    """Keyword arguments of the public function, drawn."""
    made: Made = _MODULES[case.op].make_inputs(draw, case, offsets)
    return made


def call_eager(op: str, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The definition itself, in the dtype of the inputs: the float64 truth, or the eager yardstick of a dtype.

    The call is put together by the module of tests, without the op's own code, so that a fault there shows.
    """
    out, lse = _MODULES[op].call_eager(op, inputs)
    return out, lse


def reach(op: str, inputs: Mapping[str, Any], name: str, place: tuple[int, ...]) -> Reach:
    """By quantity (`out`, `lse`, `dq`, ...): True where a value at `place` of input `name` may be noticed."""
    places: Reach = _MODULES[op].reach(inputs, name, place)
    return places
