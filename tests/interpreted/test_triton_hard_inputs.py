"""The shared hard inputs on Triton's kernels: one value in one place, and calls whose numbers cancel or overflow.

In CI a part, by turns of the dtype; with EVERY=1 all values, places, dtypes and draws.
"""

from __future__ import annotations

import pytest
import torch
from every import EVERY, most_draws
from grid import case_ids

from interformer_kernels import testing
from interformer_kernels.testing import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLANTED = [case for op in testing.OPS for case in testing.hard_cases(op)]
VALUES = [case for op in testing.OPS for case in testing.hard_value_cases(op)]


def by_turns(cases: list[Case], share: int = 1) -> pytest.MarkDecorator:
    """Parametrise over the cases, or one in `share` of them, and a dtype each."""
    found = [
        pytest.param(case, dtype, id=f"{name}-{i}-{dtype}")
        for i, (case, name) in enumerate(zip(cases, case_ids(cases), strict=True))
        if EVERY or i % share == 0
        for dtype in (DTYPES if EVERY else (DTYPES[i % len(DTYPES)],))
    ]
    return pytest.mark.parametrize(("case", "dtype"), found)


@by_turns(PLANTED)
def test_one_value_in_one_place(case: Case, dtype: torch.dtype) -> None:
    inputs = testing.make_inputs(case, dtype)
    plants = list(testing.plants(inputs))
    chosen = plants if EVERY else [plant for plant in plants if plant.value == "nan"][1::4]
    assert not testing.check_planted(case, "triton", inputs, chosen)


@by_turns(VALUES, share=8)
def test_hard_values_are_within_the_budget(case: Case, dtype: torch.dtype) -> None:
    rows = testing.compare_hard(case, "triton", dtype, most_draws=most_draws(2))
    assert not [row for row in rows if not row.ok]
