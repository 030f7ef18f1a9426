"""Every case of every op against the float64 truth, within the error budget of docs/ops.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from every import most_draws
from grid import DTYPES, backends, over_cases
from torch import Tensor

from interformer_kernels import testing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_cases()
def test_error_is_within_the_budget(backend: str, case: testing.Case, dtype: torch.dtype) -> None:
    """In CI, kernels with all draws that quantities of 64 numbers need, the definition with a few."""
    few = most_draws(2 if backend == "reference" else 16)
    assert not [row for row in testing.compare(case, backend, dtype, most_draws=few) if not row.ok]


@pytest.mark.parametrize("backend", backends("pma_pooling"))
def test_the_gradient_of_a_single_gate_is_within_the_budget(backend: str) -> None:
    case = next(case for case in testing.cases("pma_pooling") if case.gate == "scalar")
    rows = testing.compare(case, backend, torch.bfloat16)
    assert "dgate" in {row.quantity for row in rows}
    assert not [row for row in rows if not row.ok]


@over_cases()
def test_tail_and_dtype(backend: str, case: testing.Case) -> None:
    """Outputs and gradients keep the inputs' shapes and dtypes, and are exactly zero on the tail."""
    inputs = testing.make_inputs(case, torch.bfloat16)
    found = testing.evaluate(lambda: testing.call(case.op, inputs, backend), case.op, inputs)
    for name, x in found.items():
        assert x.isfinite().all() or name == "lse", name
        wanted = torch.float32 if name == "lse" else torch.bfloat16
        assert x.dtype == (inputs[name[1:]].dtype if name.startswith("d") else wanted), name
        if name.startswith("d"):
            assert x.shape == inputs[name[1:]].shape
    of_rows = case.op in ("pma_pooling", "jagged_weighted_sum")
    if case.tail and not of_rows and inputs.get("q", torch.empty(0, 0, 0)).dim() == 3:
        assert not found["out"][-case.tail :].any()
    for name in ("dk", "dv", "dx", "dscores", "dweights"):
        if case.tail and name in found:
            assert not found[name][-case.tail :].any(), name


@over_cases()
def test_two_runs_give_the_same_bits(backend: str, case: testing.Case) -> None:
    inputs = testing.make_inputs(case, torch.float32)
    runs = [testing.evaluate(lambda: testing.call(case.op, inputs, backend), case.op, inputs) for _ in range(2)]
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name


def test_the_budget_sees_a_wrong_result() -> None:
    """A check that cannot fail is none: one wrong number among many, all a little wrong, a NaN, a wrong infinity."""
    truth = torch.randn(5000, dtype=torch.float64)
    eager = truth.float()

    def share(change: Callable[[Tensor], object]) -> float:
        found = eager.clone()
        change(found)
        return testing.Sums.of(found, eager, truth).judged("out").share

    assert share(lambda x: None) < 0.5
    assert share(lambda x: x[7].add_(1e-5)) > 1
    assert share(lambda x: x.mul_(1 + 3e-7)) > 1
    assert share(lambda x: x[7].fill_(torch.nan)) == torch.inf
    assert share(lambda x: x[7].fill_(torch.inf)) == torch.inf


def test_small_quantities_are_pooled_until_they_have_1024_numbers() -> None:
    def draw(seed: int) -> testing.Errors:
        seeds.append(seed)
        truth = torch.ones(100, dtype=torch.float64)
        few, none = truth[:1], 0 * truth
        return {name: testing.Sums.of(x.float(), x.float(), x) for name, x in (("a", truth), ("b", few), ("c", none))}

    seeds: list[int] = []
    assert testing.pooled(draw, 3)["b"].numbers == 1024
    assert seeds == list(range(3, 3 + 1024))
    assert {name: sums.numbers for name, sums in testing.pooled(draw, most_draws=11).items()} == {"a": 1100, "c": 0}
