"""The shared hard inputs on the CUDA kernels: one value in one place, and calls whose numbers cancel or overflow."""

from __future__ import annotations

import pytest
import torch
from hard_calls import LARGE, over_planted, over_values, planted_problems, value_breaches

from interformer_kernels.testing import Case


@over_planted
def test_one_value_in_one_place(case: Case, dtype: torch.dtype) -> None:
    assert not planted_problems("cuda", case, dtype)


@over_values
def test_hard_values_are_within_the_budget(case: Case, dtype: torch.dtype) -> None:
    assert not value_breaches("cuda", case, dtype)


@pytest.mark.parametrize(("case", "dtype"), LARGE)
def test_scores_of_hundreds_are_within_the_budget(case: Case, dtype: torch.dtype) -> None:
    assert not value_breaches("cuda", case, dtype)
