"""The grid of small calls that every backend of an op must get right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from interformer_kernels._checks import FFN_ACTIVATIONS, GATE_ACTIVATIONS, GATE_FORMS, SCORES

OPS = ("jagged_attention", "pma_pooling", "gated_cross_attention", "apply_rotary", "personalized_ffn")
NO_ROWS: tuple[int, ...] = ()
ALL_EMPTY = (0, 0, 0)
MIXED = (5, 0, 37, 1, 8)
TILE_EDGES = (63, 0, 64, 65, 1)
ONE_GIANT = (1, 2, 300, 0, 3)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one op: row lengths, sizes, and which of the op's options it uses.

    Attributes:
        lengths: tokens of each row (of the keys, where queries have their own).
        query_lengths: queries of each row; for `gated_cross_attention`, None means dense queries.
        queries: seeds `M`, or dense queries `N` of a row.
        tail: tokens behind the last row; their inputs hold NaN.
        gate: `""` (none), or its shape: `"full"`, `"head"` `[..., H, 1]`, `"token"` `[..., 1, 1]`, `"channel"`
            `[H, Dv]`, `"heads"` `[H, 1]`, `"scalar"`.
        rope: channels that rotate; 0 is no rotary embedding.
        positions: explicit rotary positions instead of the index in the row.
        shared_value: `v=None`, the keys are the values (pma_pooling).
        bias: with a bias (personalized_ffn).
        strided: tensors are slices of wider ones, so that only their last axis is contiguous.
        options: further keyword arguments of the public function.
    """

    op: str
    name: str
    lengths: tuple[int, ...] = MIXED
    query_lengths: tuple[int, ...] | None = None
    queries: int = 3
    heads: int = 4
    kv_heads: int = 4
    head_size: int = 16
    value_size: int = 16
    tail: int = 3
    gate: str = ""
    residual: bool = False
    rope: int = 0
    positions: bool = False
    strided: bool = False
    shared_value: bool = False
    bias: bool = True
    index_dtype: torch.dtype = torch.int64
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


_SCORES: tuple[dict[str, Any], ...] = tuple(
    {"score": score, "post_scale": 0.125, "scale": 0.3} for score in SCORES if score != "softmax"
)
_GATES = tuple((form, act) for form in GATE_FORMS for act in GATE_ACTIVATIONS)
_GATE_SHAPES = ("full", "head", "channel", "scalar", "full", "token", "heads", "channel")


def _attention_cases(op: str, case: Callable[..., Case]) -> list[Case]:
    """The cases of every op of the attention family."""
    cases = [
        case(op, "plain"),
        case(op, "tile edges", lengths=TILE_EDGES, index_dtype=torch.int32),
        case(op, "one giant row", lengths=ONE_GIANT),
        case(op, "all rows empty", lengths=ALL_EMPTY),
        case(op, "no rows", lengths=NO_ROWS),
        case(op, "no tokens", lengths=ALL_EMPTY, tail=0),
        case(op, "grouped heads, strided", kv_heads=2, strided=True),
        case(op, "D != Dv, odd sizes", head_size=7, value_size=10),
        case(op, "one channel", head_size=1, value_size=1),
        case(op, "gate and residual", gate="full", residual=True),
        case(op, "residual", residual=True),
    ]
    cases += [case(op, f"score {o['score']}", options=o) for o in _SCORES]
    for (form, activation), shape in zip(_GATES, _GATE_SHAPES, strict=True):
        gate = {"gate": shape, "residual": form == "self"}
        # A gradient of one number is drawn a thousand times, and one of 16 still 64 times.
        small = {"lengths": (5, 0, 3), "head_size": 4, "value_size": 4}
        sizes: dict[str, Any] = {"scalar": small, "heads": {"heads": 16, **small}}.get(shape, {})
        options = {"gate_form": form, "gate_activation": activation}
        cases.append(case(op, f"gate {form} {activation} {shape}", **gate, **sizes, options=options))
    return cases


def cases(op: str) -> list[Case]:
    """The grid of small calls that every backend of `op` must get right; names are unique within an op."""
    if op == "apply_rotary":
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
    if op == "personalized_ffn":
        grid = [
            Case(op, f"{act}, bias, residual", residual=True, options={"activation": act}) for act in FFN_ACTIVATIONS
        ]
        grid += [Case(op, "plain", bias=False), Case(op, "tile edges", lengths=TILE_EDGES)]
        grid += [Case(op, "all rows empty", lengths=ALL_EMPTY), Case(op, "no rows", lengths=NO_ROWS)]
        grid += [Case(op, "odd sizes, strided", head_size=7, value_size=10, strided=True, index_dtype=torch.int32)]
        return grid
    grid = _attention_cases(op, Case)
    if op == "pma_pooling":
        grid += [
            Case(op, "v is k", shared_value=True, kv_heads=1),
            Case(op, "v is k, identity score", shared_value=True, options=_SCORES[0]),
            Case(op, "skip prefix", options={"skip_prefix": 2}),
            Case(op, "one seed", queries=1),
            Case(op, "many seeds", queries=33),
        ]
    elif op == "gated_cross_attention":
        grid += [
            Case(op, "jagged queries", query_lengths=(2, 3, 0, 9, 1), gate="full", residual=True),
            Case(op, "one query", queries=1, gate="head"),
            Case(op, "no queries", queries=0),
        ]
    else:
        masks: list[dict[str, Any]] = [
            {"causal": True},
            {"window": (3, 2)},
            {"window": (4, -1), "causal": True},
            {"window": (2, 0), "num_prefix": 2},
            {"causal": True, "num_prefix": 3, "score": "silu", "post_scale": 0.5},
        ]
        grid += [Case(op, f"mask {', '.join(map(str, m))}", options=m) for m in masks]
        grid += [Case(op, f"cross {', '.join(map(str, m))}", query_lengths=(2, 3, 40, 0, 9), options=m) for m in masks]
        grid += [Case(op, f"rotary interleaved={i}", rope=16, options={"rope_interleaved": i}) for i in (False, True)]
        grid += [
            Case(op, "rotary on some channels, positions", rope=10, positions=True, kv_heads=2),
            Case(op, "rotary, cross, positions", rope=16, positions=True, query_lengths=(2, 3, 40, 0, 9)),
            Case(op, "rotary, window, gate", rope=16, gate="head", residual=True, options={"window": (3, 3)}),
        ]
    return grid
