"""The small model of the tests of InterFormer, and an equality that float64 must keep."""

from __future__ import annotations

import torch
from interformer import InterFormerConfig
from torch import Tensor

SMALL = InterFormerConfig(
    embed_dim=8,
    num_heads=2,
    num_layers=2,
    cross_rank=4,
    interaction_hidden=(12,),
    pffn_hidden=(6,),
    pffn_inner=5,
    head_hidden=(16, 8),
    max_history=40,
    embedding_std=0.5,
)


def assert_equal_sums(actual: Tensor, expected: Tensor) -> None:
    """Check equality up to the order of float64 sums, more strictly than the 1e-7 of `assert_close`."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
