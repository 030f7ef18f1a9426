"""Random calls of the emulated CUDA kernels are within the budget, and one bad value stays where it belongs.

These are a few calls; `make fuzz` makes many.
"""

from __future__ import annotations

import pytest
import torch
from grid import GPU_DTYPES
from hypothesis import given
from random_calls import check_call, check_plant, memories, on_slow_backends, plant_numbers, seeds, small_cases

from interformer_kernels.testing import Case

each_dtype = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)


@each_dtype
@on_slow_backends
@given(case=small_cases, seed=seeds, memory=memories)
def test_any_legal_call_is_within_the_budget(case: Case, dtype: torch.dtype, seed: int, memory: str) -> None:
    check_call("cuda", case, dtype, seed, memory, most_draws=2)


@each_dtype
@on_slow_backends
@given(case=small_cases, seed=seeds, number=plant_numbers)
def test_a_bad_value_stays_where_it_belongs(case: Case, dtype: torch.dtype, seed: int, number: int) -> None:
    check_plant("cuda", case, dtype, seed, number)
