"""Inputs and the error budget, shared by the tests, the benches and `interformer-kernels parity`.

A `Case` names one call of one op; `make_inputs` draws its tensors; `compare` runs it on a backend and holds the output,
the log-sum-exp and every gradient against the float64 truth. The budget of a quantity is OPS.md's:

    error <= 2 x (error of the same formula in eager PyTorch at the same dtype) + one rounding unit of its largest value

where errors are the largest absolute difference to the truth. Nothing here is tuned by hand. For float64 there is no
finer truth: eager PyTorch's float32 error, scaled by the ratio of the two rounding units (`2**-29`), stands in for
eager's, and is allowed once more, since the float64 truth itself errs by as much.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import interformer_kernels
from interformer_kernels import reference
from interformer_kernels._checks import FFN_ACTIVATIONS, GATE_ACTIVATIONS, GATE_FORMS, SCORES

OPS = ("jagged_attention", "pma_pooling", "gated_cross_attention", "apply_rotary", "personalized_ffn")
# Inputs that get gradients, by op; a call may leave some out.
DIFFERENTIABLE = {
    "jagged_attention": ("q", "k", "v", "gate", "residual"),
    "pma_pooling": ("seeds", "k", "v", "gate", "residual"),
    "gated_cross_attention": ("q", "k", "v", "gate", "residual"),
    "apply_rotary": ("x",),
    "personalized_ffn": ("x", "weight", "bias", "residual"),
}
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
        gate: `""` (none), or its shape: `"full"`, `"head"` `[..., H, 1]`, `"channel"` `[H, Dv]`, `"scalar"`.
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


class Row(NamedTuple):
    """One compared quantity: its largest absolute error against the float64 truth, and what it may be."""

    quantity: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Within the budget (a NaN error is not)."""
        return self.error <= self.budget


# ---------------------------------------------------------------- the cases


_SCORES: tuple[dict[str, Any], ...] = tuple(
    {"score": score, "post_scale": 0.125, "scale": 0.3} for score in SCORES if score != "softmax"
)
_GATES = tuple((form, act) for form in GATE_FORMS for act in GATE_ACTIVATIONS)


def _attention_cases(op: str, case: Callable[..., Case]) -> list[Case]:
    """What every op of the attention family is asked."""
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
    for (form, activation), shape in zip(_GATES, ("full", "head", "channel", "scalar") * 2, strict=True):
        options = {"gate_form": form, "gate_activation": activation}
        cases.append(
            case(op, f"gate {form} {activation} {shape}", gate=shape, residual=form == "self", options=options)
        )
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
        found = []
        for interleaved in (False, True):
            for extra in shapes:
                name = ", ".join(["interleaved" if interleaved else "halves", *map(str, extra)])
                found.append(Case(op, name, **{"rope": 16, **extra, "options": {"interleaved": interleaved}}))
        return found
    if op == "personalized_ffn":
        found = [
            Case(op, f"{act}, bias, residual", residual=True, options={"activation": act}) for act in FFN_ACTIVATIONS
        ]
        found += [Case(op, "plain", bias=False), Case(op, "tile edges", lengths=TILE_EDGES)]
        found += [Case(op, "all rows empty", lengths=ALL_EMPTY), Case(op, "no rows", lengths=NO_ROWS)]
        found += [Case(op, "odd sizes, strided", head_size=7, value_size=10, strided=True, index_dtype=torch.int32)]
        return found
    found = _attention_cases(op, Case)
    if op == "pma_pooling":
        found += [
            Case(op, "v is k", shared_value=True, kv_heads=1),
            Case(op, "v is k, identity score", shared_value=True, options=_SCORES[0]),
            Case(op, "skip prefix", options={"skip_prefix": 2}),
            Case(op, "one seed", queries=1),
            Case(op, "many seeds", queries=33),
        ]
    elif op == "gated_cross_attention":
        found += [
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
        found += [Case(op, f"mask {', '.join(map(str, m))}", options=m) for m in masks]
        found += [Case(op, f"cross {', '.join(map(str, m))}", query_lengths=(2, 3, 40, 0, 9), options=m) for m in masks]
        found += [Case(op, f"rotary interleaved={i}", rope=16, options={"rope_interleaved": i}) for i in (False, True)]
        found += [
            Case(op, "rotary on some channels, positions", rope=10, positions=True, kv_heads=2),
            Case(op, "rotary, cross, positions", rope=16, positions=True, query_lengths=(2, 3, 40, 0, 9)),
            Case(op, "rotary, window, gate", rope=16, gate="head", residual=True, options={"window": (3, 3)}),
        ]
    return found


# ---------------------------------------------------------------- inputs


def offsets_of(lengths: Sequence[int], dtype: torch.dtype = torch.int64, device: str = "cpu") -> Tensor:
    """Offsets `[B+1]` of rows of these lengths."""
    ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return ends.to(device, dtype)


def rotary_tables(length: int, channels: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """The tables `(cos, sin)`, float32 `[length, channels/2]`, of the usual rotary embedding."""
    frequency = base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


class _Draw:
    """Draws a case's tensors from one seeded generator, in the case's layout."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str, seed: int) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def leaf(self, *shape: int, rows: int | None = None, gradient: bool = True) -> Tensor:
        """Normal numbers; from token `rows` on (where given) NaN; a gradient leaf."""
        wide = (*shape[:-1], shape[-1] + 3) if self.case.strided and shape else shape
        x = torch.randn(wide, generator=self.generator, dtype=torch.float64)
        if rows is not None:
            x[rows:] = torch.nan
        x = x.to(self.device, self.dtype)
        x = x[..., 1 : 1 + shape[-1]] if self.case.strided and shape else x
        return x.requires_grad_(gradient)

    def epilogue(self, shape: tuple[int, ...], rows: int | None) -> dict[str, Tensor]:
        """Gate and residual for an output of this shape."""
        gates = {"full": shape, "head": (*shape[:-1], 1), "channel": shape[-2:], "scalar": ()}
        found = {}
        if self.case.gate:
            per_token = self.case.gate in ("full", "head")
            found["gate"] = self.leaf(*gates[self.case.gate], rows=rows if per_token else None)
        if self.case.residual:
            found["residual"] = self.leaf(*shape, rows=rows)
        return found

    def tables(self) -> tuple[Tensor, Tensor]:
        """Rotary tables just long enough for the longest row."""
        longest = max((*self.case.lengths, *(self.case.query_lengths or ()), 1))
        cos, sin = rotary_tables(longest, self.case.rope)
        return cos.to(self.device), sin.to(self.device)

    def positions(self, total: int) -> Tensor:
        """Rotary positions of `total` tokens, anywhere in the tables."""
        drawn = torch.randint(self.tables()[0].shape[0], (total,), generator=self.generator)
        return drawn.to(self.device)


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of the case's public function, gradient leaves included, and the output's `grad_out`."""
    draw = _Draw(case, dtype, device, seed)
    make = {"apply_rotary": _rotary_inputs, "personalized_ffn": _ffn_inputs}.get(case.op, _attention_inputs)
    inputs, shape, rows = make(draw, case, offsets_of(case.lengths, case.index_dtype, device))
    return {**case.options, **inputs, "grad_out": draw.leaf(*shape, rows=rows, gradient=False)}


# What each maker returns: arguments, the output's shape, and its number of tokens before the tail (None: no tail).
_Made = tuple[dict[str, Any], tuple[int, ...], int | None]


def _attention_inputs(draw: _Draw, case: Case, offsets: Tensor) -> _Made:
    rows = sum(case.lengths)
    tokens, batch = rows + case.tail, len(case.lengths)
    value_size = case.head_size if case.shared_value else case.value_size
    inputs: dict[str, Any] = {
        "k": draw.leaf(tokens, case.kv_heads, case.head_size, rows=rows),
        "v": None if case.shared_value else draw.leaf(tokens, case.kv_heads, case.value_size, rows=rows),
    }
    shape: tuple[int, ...] = (batch, case.queries, case.heads, value_size)
    q_rows = None
    if case.op == "pma_pooling":
        inputs.update(seeds=draw.leaf(case.queries, case.heads, case.head_size), offsets=offsets)
    elif case.op == "gated_cross_attention" and case.query_lengths is None:
        inputs.update(q=draw.leaf(*shape[:3], case.head_size), kv_offsets=offsets)
    else:
        q_rows = rows if case.query_lengths is None else sum(case.query_lengths)
        inputs.update(_jagged_queries(draw, case, offsets, q_rows))
        shape = (q_rows + case.tail, case.heads, value_size)
    return {**inputs, **draw.epilogue(shape, q_rows)}, shape, q_rows


def _jagged_queries(draw: _Draw, case: Case, offsets: Tensor, rows: int) -> dict[str, Any]:
    """Queries, offsets and rotary arguments of a call whose queries are jagged."""
    found: dict[str, Any] = {"q": draw.leaf(rows + case.tail, case.heads, case.head_size, rows=rows)}
    own = None if case.query_lengths is None else offsets_of(case.query_lengths, case.index_dtype, draw.device)
    if case.op == "gated_cross_attention":
        return {**found, "kv_offsets": offsets, "q_offsets": own}
    found["offsets"] = offsets if own is None else own
    if own is not None:
        found["kv_offsets"] = offsets
    if case.rope:
        found["rope"] = draw.tables()
        if case.positions:
            pair = draw.positions(rows + case.tail), draw.positions(sum(case.lengths) + case.tail)
            found["rope_positions"] = pair[0] if own is None else pair
    return found


def _rotary_inputs(draw: _Draw, case: Case, offsets: Tensor) -> _Made:
    rows = sum(case.lengths)
    shape = (rows + case.tail, case.heads, case.head_size)
    inputs = {"x": draw.leaf(*shape, rows=rows), "offsets": offsets, "rope": draw.tables()}
    if case.positions:
        inputs["positions"] = draw.positions(shape[0])
    return inputs, shape, rows


def _ffn_inputs(draw: _Draw, case: Case, offsets: Tensor) -> _Made:
    rows, batch = sum(case.lengths), len(case.lengths)
    shape = (rows + case.tail, case.value_size)
    inputs = {"x": draw.leaf(shape[0], case.head_size, rows=rows), "offsets": offsets}
    inputs["weight"] = draw.leaf(batch, case.head_size, case.value_size)
    if case.bias:
        inputs["bias"] = draw.leaf(batch, case.value_size)
    if case.residual:
        inputs["residual"] = draw.leaf(*shape, rows=rows)
    return inputs, shape, rows


def row_of(x: Tensor, lengths: Sequence[int], b: int) -> Tensor:
    """What a tensor of rows, or of their tokens, holds of row `b`."""
    first = sum(lengths[:b])
    return x[b : b + 1] if x.shape[0] == len(lengths) else x[first : first + lengths[b]]


def alone(inputs: Mapping[str, Any], lengths: Sequence[int], b: int) -> dict[str, Any]:
    """The call of row `b` of a batch by itself: tensors of rows and tokens are cut, all else is shared."""
    found = dict(inputs)
    for name, x in inputs.items():
        if name in ("offsets", "kv_offsets"):
            found[name] = offsets_of((lengths[b],), x.dtype, str(x.device))
        elif name in ("q", "k", "v", "x", "weight", "bias", "residual", "grad_out") and x is not None:
            found[name] = row_of(x.detach(), lengths, b).requires_grad_(x.requires_grad)
    return found


# ---------------------------------------------------------------- the comparison


def call(op: str, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, Tensor | None]:
    """The public function on these inputs: `(out, lse)`; `lse` is None where the op or score has none."""
    arguments = {name: x for name, x in inputs.items() if name != "grad_out"}
    with_lse = op in ("jagged_attention", "pma_pooling", "gated_cross_attention") and (
        arguments.get("score", "softmax") == "softmax"
    )
    function = getattr(interformer_kernels, op)
    if with_lse:
        out, lse = function(**arguments, return_lse=True, backend=backend)
        return out, lse
    return function(**arguments, backend=backend), None


def call_eager(op: str, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The definition itself, in the dtype of the inputs: the float64 truth, or the eager yardstick of a dtype."""
    flat: dict[str, Any] = {"scale": None, "post_scale": 1.0, "score": "softmax", "skip_prefix": 0, "causal": False}
    flat.update(gate_form="multiply", gate_activation="sigmoid", activation="identity", window=(-1, -1), num_prefix=0)
    flat.update(inputs, interleaved=inputs.get("interleaved", False))
    flat["rope_interleaved"] = inputs.get("rope_interleaved", False)
    flat["window_left"], flat["window_right"] = flat["window"]
    flat["cos"], flat["sin"] = inputs.get("rope") or (None, None)
    positions = inputs.get("rope_positions")
    pair = positions if isinstance(positions, tuple) else (positions, positions)
    flat["positions_q"], flat["positions_k"] = pair
    if flat["scale"] is None and "k" in inputs:
        flat["scale"] = inputs["k"].shape[-1] ** -0.5
    definition = getattr(reference, op)
    result = definition(**{name: flat.get(name) for name in inspect.signature(definition).parameters})
    if isinstance(result, Tensor):
        return result, None
    return result[0], result[1] if flat["score"] == "softmax" else None


def evaluate(run: Callable[[], tuple[Tensor, Tensor | None]], op: str, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The output, the log-sum-exp and every gradient of one run, by name."""
    out, lse = run()
    found = {"out": out.detach()}
    if lse is not None:
        found["lse"] = lse.detach()
    names = [name for name in DIFFERENTIABLE[op] if inputs.get(name) is not None]
    leaves = [inputs[name] for name in names]
    grads = torch.autograd.grad(out, leaves, inputs["grad_out"], allow_unused=True, materialize_grads=True)
    found.update({f"d{name}": grad for name, grad in zip(names, grads, strict=True)})
    return found


def cast_inputs(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same numbers in another dtype, as new gradient leaves; indices and rotary tables are left as they are."""
    found = dict(inputs)
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            found[name] = x.detach().to(dtype).requires_grad_(x.requires_grad)
    return found


def largest_error(found: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; equal infinities differ by nothing, and NaN stays NaN."""
    if found.shape != truth.shape:
        raise AssertionError(f"found shape {list(found.shape)}, wanted {list(truth.shape)}")
    difference = (found.double() - truth.double()).abs()
    difference = difference.masked_fill(found.double() == truth.double(), 0)
    return float(difference.max()) if difference.numel() else 0.0


Run = Callable[[Mapping[str, Any]], tuple[Tensor, Tensor | None]]
# Of one draw, by quantity: the dtype found, the error found, eager PyTorch's error, and the largest true value.
Errors = dict[str, tuple[torch.dtype, float, float, float]]


def compare(
    case: Case,
    backend: str | None,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    make: Callable[[Case, torch.dtype, str, int], dict[str, Any]] = make_inputs,
    draws: Sequence[int] = (2, 12),
) -> list[Row]:
    """Hold one case on one backend against the float64 truth; a row for the output and for each gradient.

    Errors are the largest over a few draws of the inputs, the backend's and eager PyTorch's alike. Of a handful of
    numbers a single draw's error is a matter of luck, so a suspicion is settled by more draws, again for both: `draws`
    are their numbers, from the first look to the last word.
    """
    errors: list[Errors] = []
    rows: list[Row] = []
    for wanted in draws:
        for i in range(len(errors), wanted):
            inputs = make(case, dtype, device, seed + i)
            errors.append(measure(lambda made: call(case.op, made, backend), case.op, inputs))
        rows = judge(errors)
        if all(row.ok for row in rows):
            break
    return rows


def measure(run: Run, op: str, inputs: Mapping[str, Any]) -> Errors:
    """Errors of one run (the output, the log-sum-exp where it returns one, every gradient), and eager PyTorch's."""
    found = evaluate(lambda: run(inputs), op, inputs)
    exact = cast_inputs(inputs, torch.float64)
    truth = evaluate(lambda: call_eager(op, exact), op, exact)
    double = inputs["grad_out"].dtype == torch.float64
    rough = cast_inputs(inputs, torch.float32) if double else inputs
    eager = evaluate(lambda: call_eager(op, rough), op, rough)
    errors = {}
    for quantity, x in found.items():
        true = truth[quantity]
        finite = true[true.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        errors[quantity] = x.dtype, largest_error(x, true), largest_error(eager[quantity], true), largest
    return errors


def judge(draws: Sequence[Errors]) -> list[Row]:
    """The largest errors over the draws against their budget."""
    rows = []
    for quantity, (dtype, *_) in draws[0].items():
        _, found, eager, largest = zip(*(draw[quantity] for draw in draws), strict=True)
        ratio, share = (2.0**-29, 3) if dtype == torch.float64 else (1.0, 2)
        error = math.nan if any(map(math.isnan, found)) else max(found)
        rows.append(Row(quantity, error, share * ratio * max(eager) + torch.finfo(dtype).eps * max(largest)))
    return rows
