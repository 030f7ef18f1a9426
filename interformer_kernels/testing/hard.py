"""Hard inputs: a value that is extreme or not finite in one place, and calls whose numbers cancel or overflow.

Two kinds of check, for any backend:

- `compare_hard` holds calls of `HARD_VALUES` (gates near 0, equal scores, a one-hot softmax, scores of a million, the
  dtype's largest numbers, ...) against the float64 truth, by the rule of `compare`.
- `check_planted` puts one value in one place of one input. Numbers that must not notice it keep their bits (other rows,
  other key/value heads, other queries). Numbers that notice it hide no NaN, and are finite where a finite value leaves
  eager PyTorch's result finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interformer_kernels.testing.budget import (
    Errors,
    Row,
    Sums,
    call,
    call_eager,
    cast_inputs,
    evaluate,
    judge,
    pooled,
)
from interformer_kernels.testing.grid import Case
from interformer_kernels.testing.inputs import make_inputs
from interformer_kernels.testing.reach import reach

Inputs = dict[str, Any]

# Rows that share a tile of short rows, one beyond it, and an empty one; heads in groups, and packed where they may be.
_LENGTHS = (3, 0, 9, 1, 37)
_SIZES: dict[str, Any] = {"lengths": _LENGTHS, "heads": 4, "kv_heads": 2, "head_size": 8, "value_size": 6}


def _pointwise(score: str) -> dict[str, Any]:
    return {"score": score, "post_scale": 0.125}


def hard_cases(op: str) -> list[Case]:
    """The calls into which values are planted."""
    if op == "apply_rotary":
        return [Case(op, "rotary", lengths=_LENGTHS, heads=2, head_size=8, rope=6)]
    if op == "personalized_ffn":
        options = {"activation": "gelu"}
        return [Case(op, "ffn", lengths=_LENGTHS, head_size=8, value_size=6, residual=True, options=options)]
    full: dict[str, Any] = {**_SIZES, "gate": "full", "residual": True}
    found = [
        Case(op, "gate and residual", **full),
        Case(op, "head gate, silu", **_SIZES, gate="head", options=_pointwise("silu")),
    ]
    if op == "jagged_attention":
        found += [Case(op, "causal, window, prefix", **_SIZES, options={"window": (4, 0), "num_prefix": 1})]
        found += [Case(op, "cross", **_SIZES, query_lengths=(2, 3, 0, 20, 9), options={"causal": True})]
    elif op == "pma_pooling":
        found += [Case(op, "v is k, skip prefix", **_SIZES, shared_value=True, options={"skip_prefix": 2})]
    else:
        found += [Case(op, "jagged queries", **_SIZES, query_lengths=(2, 3, 0, 9, 1))]
    return found


# ---------------------------------------------------------------- one value in one place

# The values that are planted, as functions of the dtype.
PLANTED: dict[str, Callable[[torch.dtype], float]] = {
    "nan": lambda dtype: math.nan,
    "inf": lambda dtype: math.inf,
    "-inf": lambda dtype: -math.inf,
    "largest": lambda dtype: torch.finfo(dtype).max,
    "-largest": lambda dtype: torch.finfo(dtype).min,
    "subnormal": lambda dtype: torch.finfo(dtype).smallest_normal / 4,
}


class Plant(NamedTuple):
    """A value (of PLANTED, by name) at a place of an input."""

    name: str
    place: tuple[int, ...]
    value: str

    def __str__(self) -> str:
        return f"{self.value} in {self.name}[{', '.join(map(str, self.place))}]"


def held_tokens(x: Tensor) -> int:
    """Entries of the first axis before the tail, whose numbers are NaN."""
    tail = x.detach().flatten(1).isnan().all(1)
    return int((~tail).nonzero().max()) + 1 if len(tail) and not tail.all() else 0


def plants(inputs: Mapping[str, Any]) -> Iterator[Plant]:
    """Every value in every floating input, `grad_out` included: near its beginning, and at the end of what is held."""
    for name, x in inputs.items():
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
            continue
        sizes = (held_tokens(x), *x.shape[1:]) if x.dim() > 1 else tuple(x.shape)
        if 0 in sizes:
            continue
        for place in sorted({tuple(size // 3 for size in sizes), tuple(size - 1 for size in sizes)}):
            for value in PLANTED:
                yield Plant(name, place, value)


def planted(inputs: Mapping[str, Any], plant: Plant) -> Inputs:
    """The inputs with the plant in them."""
    found = dict(inputs)
    x = inputs[plant.name]
    changed = x.detach().clone()
    changed[plant.place] = PLANTED[plant.value](x.dtype)
    found[plant.name] = changed.requires_grad_(x.requires_grad)
    return found


def check_planted(case: Case, backend: str | None, inputs: Mapping[str, Any], chosen: Iterable[Plant]) -> list[str]:
    """The faults in a backend's answers to the inputs, planted in turn; empty where there is none."""
    clean = evaluate(lambda: call(case.op, inputs, backend), case.op, inputs)
    return [line for plant in chosen for line in _check_plant(case, backend, inputs, plant, clean)]


def _check_plant(
    case: Case, backend: str | None, inputs: Mapping[str, Any], plant: Plant, clean: Mapping[str, Tensor]
) -> list[str]:
    hard = planted(inputs, plant)
    found = evaluate(lambda: call(case.op, hard, backend), case.op, hard)
    exact = cast_inputs(hard, torch.float64)
    eager = evaluate(lambda: call_eager(case.op, hard), case.op, hard)
    truth = evaluate(lambda: call_eager(case.op, exact), case.op, exact)
    masked = any(case.options.get(name) for name in ("causal", "window", "num_prefix"))
    finite = math.isfinite(PLANTED[plant.value](inputs[plant.name].dtype))
    problems = []
    for quantity, may_notice in reach(case.op, inputs, plant.name, plant.place).items():
        x, before, true = found[quantity], clean[quantity], truth[quantity]
        noticed = (x != before) & ~(x.isnan() & before.isnan()) & ~may_notice
        hidden = true.isnan() & x.isfinite()
        spoilt = true.isfinite() & eager[quantity].isfinite() & ~x.isfinite()
        # Behind a mask, what is not finite may reach other queries of its row, or not: a formula that multiplies by 0
        # notices it, and tiles that nobody sees are not read at all.
        hidden, spoilt = hidden & (not masked), spoilt & finite & (not masked)
        for what, where in (("noticed", noticed), ("hidden", hidden), ("not finite", spoilt)):
            if where.any():
                place = [int(i) for i in where.nonzero()[0]]
                problems.append(f"{plant}: {quantity}{place} {what}: {float(before[tuple(place)]):g} became "
                                f"{float(x[tuple(place)]):g}, the truth is {float(true[tuple(place)]):g}")  # fmt: skip
    return problems


# ---------------------------------------------------------------- hard numbers everywhere


def _scaled(inputs: Inputs, **factors: float) -> Inputs:
    """The inputs with some multiplied by a number."""
    found = dict(inputs)
    for name, factor in factors.items():
        if isinstance(inputs.get(name), Tensor):
            found[name] = (inputs[name].detach() * factor).requires_grad_(inputs[name].requires_grad)
    return found


def _one_hot(inputs: Inputs) -> Inputs:
    return {**inputs, "scale": 20.0}


def _equal_scores(inputs: Inputs) -> Inputs:
    """All keys of all rows are the first one."""
    k = inputs["k"].detach()
    return {**inputs, "k": k[:1].expand_as(k).contiguous().requires_grad_()} if len(k) else inputs


def _million(inputs: Inputs) -> Inputs:
    """Equal scores of about a million: the rounding of their log-sum-exp is larger than its logarithm's differences."""
    return _scaled(_equal_scores(inputs), q=1e3, seeds=1e3, k=1e3)


def _largest(inputs: Inputs) -> Inputs:
    """Values of the dtype's largest numbers, all of one sign: their mean is one of them."""
    name = "v" if isinstance(inputs.get("v"), Tensor) else "k"
    x = inputs[name].detach()
    return {**inputs, name: x.sign().abs().mul(0.99 * torch.finfo(x.dtype).max).requires_grad_()}


def _far_apart(inputs: Inputs) -> Inputs:
    """Keys near the dtype's largest number beside small queries: sums for dQ overflow but for the small `scale`."""
    # The yardstick of float64 is float32.
    size = min(torch.finfo(inputs["k"].dtype).max, torch.finfo(torch.float32).max) / 8
    # Float16 has no room for products beyond its largest number, which `scale` would bring back.
    small, values = (1e6 / size, 1e3) if size > 1e30 else (0.01, 1.0)
    return {**_scaled(inputs, k=size, q=small, seeds=small, v=values), "scale": 1 / (size * small)}


_SOFTMAX: tuple[dict[str, Any], ...] = ({},)
_ALL_SCORES = (*_SOFTMAX, _pointwise("gelu"), _pointwise("silu"))
_TANH, _SIGMOID, _SILU = ({"gate_activation": activation} for activation in ("tanh", "sigmoid", "silu"))
_SELF: dict[str, Any] = {"gate_form": "self"}
# By name: the change of a case's inputs, and the options that make it hard.
HARD_VALUES: dict[str, tuple[Callable[[Inputs], Inputs], tuple[dict[str, Any], ...]]] = {
    "gates of 1e-6": (lambda inputs: _scaled(inputs, gate=1e-6), (_TANH, {**_SELF, **_TANH}, {**_SELF, **_SILU})),
    "gates of 1e-3": (lambda inputs: _scaled(inputs, gate=1e-3), (_TANH, {**_SELF, **_TANH}, _SILU)),
    "gates of 100": (lambda inputs: _scaled(inputs, gate=100.0), (_SIGMOID, _TANH, {**_SELF, **_SIGMOID})),
    "equal scores": (_equal_scores, _ALL_SCORES),
    "one-hot softmax": (_one_hot, _SOFTMAX),
    "scores of 1e6": (_million, _SOFTMAX),
    "largest values": (_largest, _SOFTMAX),
    "keys near the largest": (_far_apart, _ALL_SCORES),
    "inputs of 1e-3": (lambda inputs: _scaled(inputs, q=1e-3, seeds=1e-3, k=1e-3, v=1e-3, x=1e-3), _ALL_SCORES),
}


def hard_value_cases(op: str) -> list[Case]:
    """The calls that are made of hard numbers; their names are those of HARD_VALUES with the case's other options."""
    sizes = {**_SIZES, "lengths": 3 * _LENGTHS}
    if op == "apply_rotary":
        return []
    if op == "personalized_ffn":
        kinds: list[dict[str, Any]] = [{"activation": activation} for activation in ("relu", "silu", "gelu")]
        return [Case(op, "inputs of 1e-3", **sizes, options=options) for options in kinds]
    return [
        Case(op, name, **sizes, gate="head" if "gates" in name else "", options=options)
        for name, (_, kinds) in HARD_VALUES.items()
        for options in kinds
    ]


def compare_hard(
    case: Case,
    backend: str | None,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    most_draws: int | None = None,
) -> list[Row]:
    """`compare` of a case of `hard_value_cases`; quantities that overflow in eager PyTorch are not judged."""
    make = HARD_VALUES[case.name][0]

    def draw(seed: int) -> Errors:
        inputs = make(make_inputs(case, dtype, device, seed))
        found = evaluate(lambda: call(case.op, inputs, backend), case.op, inputs)
        exact = cast_inputs(inputs, torch.float64)
        truth = evaluate(lambda: call_eager(case.op, exact), case.op, exact)
        rough = cast_inputs(inputs, torch.float32) if dtype == torch.float64 else inputs
        eager = evaluate(lambda: call_eager(case.op, rough), case.op, rough)
        return {
            name: Sums.of(x, eager[name], truth[name])
            for name, x in found.items()
            if not truth[name].isnan().any() and eager[name][truth[name].isfinite()].isfinite().all()
        }

    return judge(pooled(draw, seed, most_draws))
