"""A query's bits do not depend on who shares its keys, on the emulated CUDA kernels."""

from __future__ import annotations

import pytest
import torch
from grid import GPU_DTYPES
from shared_key_calls import check_same_bits


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_a_candidate_has_the_same_bits_alone_and_among_many(dtype: torch.dtype) -> None:
    check_same_bits("cuda", dtype, times=4)
