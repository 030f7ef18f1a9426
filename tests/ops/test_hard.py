"""Values that are extreme or not finite in one place, and calls whose numbers cancel or overflow, on every backend."""

from __future__ import annotations

import pytest
import torch
from every import EVERY, most_draws
from grid import DTYPES, backends, case_ids
from torch import Tensor

from interformer_kernels import testing
from interformer_kernels.testing import Case

PLANTED_CASES = [case for op in testing.OPS for case in testing.hard_cases(op)]
VALUE_CASES = [case for op in testing.OPS for case in testing.hard_value_cases(op)]


def served(op: str, dtype: torch.dtype) -> list[str]:
    """The backends that are asked; the reference, whose formula the truth is, in one dtype."""
    return [backend for backend in backends(op, dtype) if EVERY or backend != "reference" or dtype == torch.float32]


PLANTED = [
    pytest.param(backend, case, dtype, id=f"{backend}-{name}-{dtype}")
    for case, name in zip(PLANTED_CASES, case_ids(PLANTED_CASES), strict=True)
    for dtype in DTYPES
    for backend in served(case.op, dtype)
]
VALUES = [
    pytest.param(backend, case, dtype, id=f"{backend}-{name}-{i}-{dtype}")
    for i, (case, name) in enumerate(zip(VALUE_CASES, case_ids(VALUE_CASES), strict=True))
    for dtype in (DTYPES if EVERY else (DTYPES[i % len(DTYPES)], DTYPES[(i + 1) % len(DTYPES)]))
    for backend in served(case.op, dtype)
]


@pytest.mark.parametrize(("backend", "case", "dtype"), PLANTED)
def test_one_value_in_one_place(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Other rows, heads and queries keep their bits; nothing is hidden, and nothing spoilt that PyTorch keeps."""
    inputs = testing.make_inputs(case, dtype)
    assert not testing.check_planted(case, backend, inputs, testing.plants(inputs))


@pytest.mark.parametrize("backend", backends("gated_cross_attention", torch.float32))
def test_values_of_keys_that_nobody_shares(backend: str) -> None:
    """Without a row of queries; those behind the offsets belong to no row."""
    case = Case("gated_cross_attention", "nobody", lengths=(3, 0, 9), query_lengths=(), kv_rows=(), tail=2)
    inputs = testing.make_inputs(case, torch.float32)
    plants = list(testing.plants(inputs))
    assert plants
    assert not testing.check_planted(case, backend, inputs, plants)


@pytest.mark.parametrize(("backend", "case", "dtype"), VALUES)
def test_hard_values_are_within_the_budget(backend: str, case: Case, dtype: torch.dtype) -> None:
    rows = testing.compare_hard(case, backend, dtype, most_draws=most_draws(8))
    assert rows or dtype == torch.float16, "nothing was judged"  # where eager PyTorch overflows
    assert not [row for row in rows if not row.ok]


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
    assert testing.check_planted(case, "reference", inputs, plants)
