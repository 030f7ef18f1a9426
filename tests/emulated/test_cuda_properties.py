"""Any call is right on the CUDA kernels, in their emulation, and one bad value stays where it belongs.

A few calls; `make fuzz` makes many.
"""

from __future__ import annotations

import dataclasses

import hypothesis
import pytest
import torch
from hypothesis import assume, given
from random_calls import cases, check_call, check_plant, memories, plant_numbers, seeds

from interformer_kernels import _backend
from interformer_kernels.testing import Case

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# What CI has time for; the profile of `make fuzz` has its own number.
few = hypothesis.settings(max_examples=min(3, hypothesis.settings().max_examples))
AT_ONCE = few if hypothesis.settings().derandomize else hypothesis.settings()


def small(case: Case) -> Case:
    """The call with rows and heads that take no minutes, of a size that the backend serves."""
    sizes = {"head_size": min(case.head_size, 128), "value_size": min(case.value_size, 128)}
    sizes["rope"] = min(case.rope, sizes["head_size"] // 2 * 2)
    return dataclasses.replace(case, **sizes)


@each_dtype
@AT_ONCE
@given(case=cases.map(small), seed=seeds, memory=memories)
def test_any_legal_call_is_within_the_budget(case: Case, dtype: torch.dtype, seed: int, memory: str) -> None:
    assume(_backend.why_not(case.op, "cuda", "cpu", dtype) is None)
    check_call("cuda", case, dtype, seed, memory, most_draws=2)


@each_dtype
@AT_ONCE
@given(case=cases.map(small), seed=seeds, number=plant_numbers)
def test_a_bad_value_stays_where_it_belongs(case: Case, dtype: torch.dtype, seed: int, number: int) -> None:
    assume(_backend.why_not(case.op, "cuda", "cpu", dtype) is None)
    check_plant("cuda", case, dtype, seed, number)
