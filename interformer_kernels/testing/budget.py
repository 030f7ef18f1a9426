"""Errors of a backend against the float64 truth, and what they may be: the budget of docs/ops.md."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import interformer_kernels
from interformer_kernels._calls import Wide
from interformer_kernels._launch.tensors import accumulation_dtype
from interformer_kernels.ops._public import ALL as PUBLIC_OPS
from interformer_kernels.testing.case import Case
from interformer_kernels.testing.inputs import make_inputs
from interformer_kernels.testing.ops import call_eager

# Inputs that get gradients, by op; a call may leave some out.
DIFFERENTIABLE = {name: tuple(map(op.named, op.spec.differentiable)) for name, op in PUBLIC_OPS.items()}
# Inputs of the accumulation dtype, whatever the others' dtype.
WIDE = {op.named(field.name) for op in PUBLIC_OPS.values() for field in op.spec.fields if isinstance(field.note, Wide)}


class Row(NamedTuple):
    """One compared quantity against its budget: its error over all numbers, and the largest error of a single one.

    `error` is the root mean square of the differences to the float64 truth, relative to the truth's own; `budget` is
    what it may be. `largest` is the largest absolute difference of one number; `limit` is what that may be.
    """

    quantity: str
    error: float
    budget: float
    largest: float = 0.0
    limit: float = 0.0

    @property
    def share(self) -> float:
        """The larger of both errors over what they may be: above 1 is a breach; infinite for NaN."""
        shares = (_over(self.error, self.budget), _over(self.largest, self.limit))
        return math.inf if any(map(math.isnan, shares)) else max(shares)

    @property
    def ok(self) -> bool:
        """Within the budget, and no number beyond its limit (a NaN is)."""
        return self.share <= 1


def _over(error: float, budget: float) -> float:
    if error == 0:
        return 0.0
    return error / budget if budget else math.inf if error == error else math.nan


def call(op: str, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, Tensor | None]:
    """The public function on these inputs: `(out, lse)`; `lse` is None where the op or score has none."""
    arguments = {name: x for name, x in inputs.items() if name not in ("grad_out", "grad_lse")}
    with_lse = "lse" in PUBLIC_OPS[op].spec.saved and arguments.get("score", "softmax") == "softmax"
    function = getattr(interformer_kernels, op)
    if with_lse:
        out, lse = function(**arguments, return_lse=True, backend=backend)
        return out, lse
    return function(**arguments, backend=backend), None


def evaluate(run: Callable[[], tuple[Tensor, Tensor | None]], op: str, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The output, the log-sum-exp and every gradient of one run, by name."""
    out, lse = run()
    results = {"out": out.detach()}
    if lse is not None:
        results["lse"] = lse.detach()
    names = [name for name in DIFFERENTIABLE[op] if inputs.get(name) is not None]
    leaves = [inputs[name] for name in names]
    outputs, given = [out], [inputs["grad_out"]]
    if inputs.get("grad_lse") is not None:
        assert lse is not None
        # Where a query sees nothing, the gradient of its log-sum-exp shall not be noticed.
        grad_lse = inputs["grad_lse"].to(lse.dtype).masked_fill(lse.detach() == -torch.inf, torch.nan)
        outputs, given = [out, lse], [*given, grad_lse]
    grads = torch.autograd.grad(outputs, leaves, given, allow_unused=True, materialize_grads=True)
    results.update({f"d{name}": grad for name, grad in zip(names, grads, strict=True)})
    return results


def cast_inputs(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same numbers in another dtype, as new gradient leaves; sinks and biases in its accumulation dtype."""
    cast = dict(inputs)
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            own = accumulation_dtype(dtype) if name in WIDE else dtype
            cast[name] = x.detach().to(own).requires_grad_(x.requires_grad)
    return cast


NUMBERS = 1024  # fewest numbers of a quantity that are judged together

Run = Callable[[Mapping[str, Any]], tuple[Tensor, Tensor | None]]


_Three = tuple[float, float, float]


@dataclass(frozen=True)
class Sums:
    """Sums over one draw or several from which the errors of one quantity follow.

    `numbers` are the true values that are not 0. The pairs below belong to the backend's differences to the truth, to
    eager PyTorch's, and to the truth itself where it is finite: sums of squares, and largest absolute values.
    """

    dtype: torch.dtype
    numbers: int
    squares: _Three
    largest: _Three

    @classmethod
    def of(cls, x: Tensor, eager: Tensor, truth: Tensor) -> Sums:
        """The sums of one draw."""
        finite = truth.double().masked_fill(~truth.isfinite(), 0)
        errors = (differences(x, truth), differences(eager, truth), finite.abs())
        pairs = ((float(e.square().sum()), float(e.max()) if e.numel() else 0.0) for e in errors)
        squares, largest = zip(*pairs, strict=True)
        return cls(x.dtype, int(finite.count_nonzero()), squares, largest)

    def __add__(self, other: Sums) -> Sums:
        """The sums of both draws together."""
        squares, largest = _each(operator.add, self.squares, other.squares), _each(_larger, self.largest, other.largest)
        return Sums(self.dtype, self.numbers + other.numbers, squares, largest)

    def judged(self, quantity: str) -> Row:
        """The errors against their budget."""
        # There is no finer truth than float64: eager's error in float32, scaled by the ratio of the two rounding units,
        # stands in for eager's, and is allowed once more, since the truth itself errs by as much.
        ratio, share = (2.0**-29, 3) if self.dtype == torch.float64 else (1.0, 2)
        unit = torch.finfo(self.dtype).eps
        error, eager, truth = map(math.sqrt, self.squares)
        scale = truth or 1.0
        budget = share * ratio * eager / scale + (unit if truth else 0.0)
        most, most_eager, most_truth = self.largest
        return Row(quantity, error / scale, budget, most, 6 * ratio * most_eager + 2 * unit * most_truth)


def _each(function: Callable[[float, float], float], a: _Three, b: _Three) -> _Three:
    return function(a[0], b[0]), function(a[1], b[1]), function(a[2], b[2])


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


Errors = dict[str, Sums]


def differences(x: Tensor, truth: Tensor) -> Tensor:
    """Absolute differences in float64; equal infinities differ by nothing, and NaN stays NaN."""
    if x.shape != truth.shape:
        raise AssertionError(f"found shape {list(x.shape)}, wanted {list(truth.shape)}")
    x, truth = x.double(), truth.double()
    return (x - truth).abs().masked_fill(x == truth, 0)


def compare(
    case: Case,
    backend: str | None,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    make: Callable[[Case, torch.dtype, str, int], dict[str, Any]] = make_inputs,
    most_draws: int | None = None,
) -> list[Row]:
    """Hold one case on one backend against the float64 truth; a row for the output and for each gradient.

    As many inputs are drawn as give every quantity 1024 numbers. Where `most_draws` does not allow for them, a quantity
    that so many draws leave short is not judged, and has no row: fewer numbers would be a matter of luck.
    """

    def draw(seed: int) -> Errors:
        inputs = make(case, dtype, device, seed)
        return measure(lambda made: call(case.op, made, backend), case.op, inputs)

    return judge(pooled(draw, seed, most_draws))


def pooled(draw: Callable[[int], Errors], seed: int = 0, most_draws: int | None = None) -> Errors:
    """Errors over `draw(seed)`, `draw(seed + 1)`, ..., until every quantity has 1024 numbers; see `compare`.

    A true value of 0 is not counted, unless it takes more than 1024 draws: few others may ever come. A quantity
    that one draw leaves out is left out of the whole.
    """
    total = draw(seed)
    draws = 1
    most_draws = most_draws or NUMBERS
    while any(0 < sums.numbers < NUMBERS for sums in total.values()) and draws < most_draws:
        total = {name: sums + total[name] for name, sums in draw(seed + draws).items() if name in total}
        draws += 1
    if draws == NUMBERS:
        return total
    return {name: sums for name, sums in total.items() if not 0 < sums.numbers < NUMBERS}


def measure(run: Run, op: str, inputs: Mapping[str, Any]) -> Errors:
    """Errors of one run (the output, the log-sum-exp where it returns one, every gradient), and eager PyTorch's."""
    results = evaluate(lambda: run(inputs), op, inputs)
    exact = cast_inputs(inputs, torch.float64)
    truth = evaluate(lambda: call_eager(op, exact), op, exact)
    double = inputs["grad_out"].dtype == torch.float64
    rough = cast_inputs(inputs, torch.float32) if double else inputs
    eager = evaluate(lambda: call_eager(op, rough), op, rough)
    return {name: Sums.of(x, eager[name], truth[name]) for name, x in results.items()}


def judge(errors: Errors) -> list[Row]:
    """Every quantity against its budget."""
    return [sums.judged(quantity) for quantity, sums in errors.items()]
