"""Errors of a backend against the float64 truth, and what they may be: OPS.md's budget."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import interformer_kernels
from interformer_kernels import reference
from interformer_kernels.testing.grid import Case
from interformer_kernels.testing.inputs import make_inputs

# Inputs that get gradients, by op; a call may leave some out.
DIFFERENTIABLE = {
    "jagged_attention": ("q", "k", "v", "gate", "residual"),
    "pma_pooling": ("seeds", "k", "v", "gate", "residual"),
    "gated_cross_attention": ("q", "k", "v", "gate", "residual"),
    "apply_rotary": ("x",),
    "personalized_ffn": ("x", "weight", "bias", "residual"),
}


class Row(NamedTuple):
    """One compared quantity: its largest absolute error against the float64 truth, and what it may be."""

    quantity: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Within the budget (a NaN error is not)."""
        return self.error <= self.budget


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
