"""The shared hard inputs for the tests of the slow backends, interpreted and emulated.

CI runs a part, each case in one dtype in rotation; EVERY=1 runs all values, places, dtypes and draws.
"""

from __future__ import annotations

import pytest
import torch
from every import EVERY, most_draws
from grid import GPU_DTYPES, case_ids, gpu_dtypes

from interformer_kernels import testing
from interformer_kernels.testing import Case
from interformer_kernels.testing.hard_values import LARGE_SCORES


def _in_rotation(cases: list[Case], share: int = 1) -> pytest.MarkDecorator:
    """Parametrise over the cases, or one in `share` of them, and a dtype each."""
    parameters = [
        pytest.param(case, dtype, id=f"{name}-{i}-{dtype}")
        for i, (case, name) in enumerate(zip(cases, case_ids(cases), strict=True))
        if EVERY or i % share == 0
        for dtype in gpu_dtypes(i)
    ]
    return pytest.mark.parametrize(("case", "dtype"), parameters)


over_planted = _in_rotation([case for op in testing.OPS for case in testing.hard_cases(op)])
_VALUES = [case for op in testing.OPS for case in testing.hard_value_cases(op)]
over_values = _in_rotation([case for case in _VALUES if case.name != LARGE_SCORES], share=8)
# Their error in float32 is the one that heavy-tailed gradients would show.
LARGE = [
    pytest.param(case, dtype, id=f"{case.op}-{case.options['scale']:g}-{dtype}")
    for case in _VALUES
    if case.name == LARGE_SCORES
    for dtype in (GPU_DTYPES if EVERY else GPU_DTYPES[:1])
]


def planted_problems(backend: str, case: Case, dtype: torch.dtype) -> list[str]:
    """The faults that one value in one place causes."""
    inputs = testing.make_inputs(case, dtype)
    plants = list(testing.plants(inputs))
    chosen = plants if EVERY else [plant for plant in plants if plant.value == "nan"][1::4]
    return testing.check_planted(case, backend, inputs, chosen)


def value_breaches(backend: str, case: Case, dtype: torch.dtype) -> list[testing.Row]:
    """Quantities beyond their budget where numbers cancel or overflow."""
    return [row for row in testing.compare_hard(case, backend, dtype, most_draws=most_draws(2)) if not row.ok]
