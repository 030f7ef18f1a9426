"""Every case of every op against the float64 truth, within OPS.md's budget."""

from __future__ import annotations

import pytest
import torch
from grid import DTYPES, over_cases

from interformer_kernels import testing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_cases()
def test_error_is_within_the_budget(backend: str, case: testing.Case, dtype: torch.dtype) -> None:
    breaches = [row for row in testing.compare(case, backend, dtype) if not row.ok]
    assert not breaches


@over_cases()
def test_tail_and_dtype(backend: str, case: testing.Case) -> None:
    """Outputs and gradients keep the inputs' shapes and dtypes, and are exactly zero on the tail."""
    inputs = testing.make_inputs(case, torch.bfloat16)
    found = testing.evaluate(lambda: testing.call(case.op, inputs, backend), case.op, inputs)
    for name, x in found.items():
        assert x.isfinite().all() or name == "lse", name
        assert x.dtype == (torch.float32 if name == "lse" else torch.bfloat16), name
        if name.startswith("d"):
            assert x.shape == inputs[name[1:]].shape
    if case.tail and case.op != "pma_pooling" and inputs.get("q", torch.empty(0, 0, 0)).dim() == 3:
        assert not found["out"][-case.tail :].any()
    for name in ("dk", "dv", "dx"):
        if case.tail and name in found:
            assert not found[name][-case.tail :].any(), name


@over_cases()
def test_two_runs_give_the_same_bits(backend: str, case: testing.Case) -> None:
    inputs = testing.make_inputs(case, torch.float32)
    runs = [testing.evaluate(lambda: testing.call(case.op, inputs, backend), case.op, inputs) for _ in range(2)]
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name


def test_the_budget_sees_a_wrong_result() -> None:
    """A check that cannot fail is none: one wrong element, a NaN and a wrong gradient each breach."""
    case = testing.cases("pma_pooling")[0]
    inputs = testing.cast_inputs(testing.make_inputs(case, torch.float32), torch.float64)
    truth = testing.evaluate(lambda: testing.call_eager(case.op, inputs), case.op, inputs)
    out = truth["out"].clone()
    out.view(-1)[0] += 1e-3
    assert testing.largest_error(out, truth["out"]) > 9e-4
    out.view(-1)[0] = torch.nan
    assert not testing.Row("out", testing.largest_error(out, truth["out"]), 1.0).ok
