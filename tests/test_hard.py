"""Values that are extreme or not finite in one place, and calls whose numbers cancel or overflow, on every backend."""

from __future__ import annotations

import pytest
import torch
from grid import DTYPES, backends, case_ids
from torch import Tensor

from interformer_kernels import testing
from interformer_kernels.testing import Case

PLANTED_CASES = [case for op in testing.OPS for case in testing.hard_cases(op)]
VALUE_CASES = [case for op in testing.OPS for case in testing.hard_value_cases(op)]
PLANTED = [(backend, case) for case in PLANTED_CASES for backend in backends(case.op)]
VALUES = [(backend, case) for case in VALUE_CASES for backend in backends(case.op)]


def ids(pairs: list[tuple[str, Case]]) -> list[str]:
    names = case_ids([case for _, case in pairs])
    return [f"{backend}-{name}-{i}" for i, ((backend, _), name) in enumerate(zip(pairs, names, strict=True))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "case"), PLANTED, ids=ids(PLANTED))
def test_one_value_in_one_place(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Other rows, heads and queries keep their bits; nothing is hidden, and nothing spoilt that PyTorch keeps."""
    inputs = testing.make_inputs(case, dtype)
    problems = [testing.check_planted(case, backend, inputs, plant) for plant in testing.plants(inputs)]
    assert not [line for lines in problems for line in lines]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "case"), VALUES, ids=ids(VALUES))
def test_hard_values_are_within_the_budget(backend: str, case: Case, dtype: torch.dtype) -> None:
    assert not [row for row in testing.compare_hard(case, backend, dtype) if not row.ok]


@pytest.mark.parametrize("case", PLANTED_CASES, ids=case_ids(PLANTED_CASES))
def test_what_may_notice_does_notice_and_no_more(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: every input is planted, every quantity noticed by some plant, and a leak is found."""
    inputs = testing.make_inputs(case, torch.float32)
    floating = {name for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    plants = [plant for plant in testing.plants(inputs) if plant.value == "nan"]
    assert {plant.name for plant in plants} == floating
    reached = {
        name
        for plant in plants
        for name, mask in testing.reach(case.op, inputs, plant.name, plant.place).items()
        if mask.any()
    }
    assert reached == testing.evaluate(lambda: testing.call(case.op, inputs, "reference"), case.op, inputs).keys()

    right = testing.hard.call

    def leaking(op: str, made: dict[str, object], backend: str | None) -> tuple[Tensor, Tensor | None]:
        out, lse = right(op, made, backend)
        return out + 0 * out.nan_to_num(1.0).sum() if out.isfinite().all() else out * torch.nan, lse

    monkeypatch.setattr(testing.hard, "call", leaking)
    assert any(testing.check_planted(case, "reference", inputs, plant) for plant in plants)
