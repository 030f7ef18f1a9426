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
    cast_inputs,
    evaluate,
    judge,
    pooled,
)
from interformer_kernels.testing.case import Case
from interformer_kernels.testing.hard_values import HARD_VALUES, Inputs
from interformer_kernels.testing.inputs import make_inputs
from interformer_kernels.testing.ops import call_eager, reach

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
    """Every value in every floating input, given gradients included: near its beginning, and at the end of what is
    held."""
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
    hard = dict(inputs)
    x = inputs[plant.name]
    changed = x.detach().clone()
    changed[plant.place] = PLANTED[plant.value](x.dtype)
    hard[plant.name] = changed.requires_grad_(x.requires_grad)
    return hard


def check_planted(case: Case, backend: str | None, inputs: Mapping[str, Any], chosen: Iterable[Plant]) -> list[str]:
    """The faults in a backend's answers to the inputs, planted in turn; empty where there is none."""
    clean = evaluate(lambda: call(case.op, inputs, backend), case.op, inputs)
    return [line for plant in chosen for line in _check_plant(case, backend, inputs, plant, clean)]


def _check_plant(
    case: Case, backend: str | None, inputs: Mapping[str, Any], plant: Plant, clean: Mapping[str, Tensor]
) -> list[str]:
    hard = planted(inputs, plant)
    results = evaluate(lambda: call(case.op, hard, backend), case.op, hard)
    exact = cast_inputs(hard, torch.float64)
    eager = evaluate(lambda: call_eager(case.op, hard), case.op, hard)
    truth = evaluate(lambda: call_eager(case.op, exact), case.op, exact)
    masked = any(case.options.get(name) for name in ("causal", "window", "num_prefix"))
    finite = math.isfinite(PLANTED[plant.value](inputs[plant.name].dtype))
    problems = []
    for quantity, may_notice in reach(case.op, inputs, plant.name, plant.place).items():
        x, before, true = results[quantity], clean[quantity], truth[quantity]
        noticed = (x != before) & ~(x.isnan() & before.isnan()) & ~may_notice
        hidden = true.isnan() & x.isfinite()
        spoilt = true.isfinite() & eager[quantity].isfinite() & ~x.isfinite()
        # Behind a mask, what is not finite may reach other queries of its row, or not: a formula that multiplies by 0
        # notices it, and tiles that nobody sees are not read at all.
        hidden, spoilt = hidden & (not masked), spoilt & finite & (not masked)
        for fault, where in (("noticed", noticed), ("hidden", hidden), ("not finite", spoilt)):
            if where.any():
                place = [int(i) for i in where.nonzero()[0]]
                problems.append(f"{plant}: {quantity}{place} {fault}: {float(before[tuple(place)]):g} became "
                                f"{float(x[tuple(place)]):g}, the truth is {float(true[tuple(place)]):g}")  # fmt: skip
    return problems


# ---------------------------------------------------------------- hard numbers everywhere


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
        results = evaluate(lambda: call(case.op, inputs, backend), case.op, inputs)
        exact = cast_inputs(inputs, torch.float64)
        truth = evaluate(lambda: call_eager(case.op, exact), case.op, exact)
        rough = cast_inputs(inputs, torch.float32) if dtype == torch.float64 else inputs
        eager = evaluate(lambda: call_eager(case.op, rough), case.op, rough)
        return {
            name: Sums.of(x, eager[name], truth[name])
            for name, x in results.items()
            if not truth[name].isnan().any() and eager[name][truth[name].isfinite()].isfinite().all()
        }

    return judge(pooled(draw, seed, most_draws))
