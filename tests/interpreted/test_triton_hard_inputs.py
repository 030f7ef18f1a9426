"""The shared hard inputs on Triton's kernels: one value in one place, and calls whose numbers cancel or overflow."""

from __future__ import annotations

import pytest
import torch
from every import EVERY
from hard_calls import LARGE, over_planted, over_values, planted_problems, value_breaches

from interformer_kernels.testing import Case


@over_planted
def test_one_value_in_one_place(case: Case, dtype: torch.dtype) -> None:
    assert not planted_problems("triton", case, dtype)


@over_values
def test_hard_values_are_within_the_budget(case: Case, dtype: torch.dtype) -> None:
    assert not value_breaches("triton", case, dtype)


@pytest.mark.parametrize(("case", "dtype"), LARGE if EVERY else LARGE[-1:])
def test_scores_of_hundreds_are_within_the_budget(case: Case, dtype: torch.dtype) -> None:
    assert not value_breaches("triton", case, dtype)
