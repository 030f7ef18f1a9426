"""Tensors between guard zones, which show reads and writes beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interformer_kernels import testing

_GUARD = 1024  # numbers before and behind


def guarded(x: Tensor) -> Tensor:
    """The same numbers and strides, with NaN before and behind them in memory, or integers that are wrong anywhere."""
    wrong = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max // 2
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    memory = torch.full((size + 2 * _GUARD,), wrong, dtype=x.dtype)
    inside = memory.as_strided(x.shape, x.stride(), _GUARD)
    inside.copy_(x.detach())
    return inside.requires_grad_(x.requires_grad)


def guarded_inputs(case: testing.Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """`testing.make_inputs` between guard zones."""

    def moved(x: Any) -> Any:
        if isinstance(x, tuple) and any(isinstance(part, Tensor) for part in x):
            return tuple(map(moved, x))
        return guarded(x) if isinstance(x, Tensor) else x

    return {name: moved(x) for name, x in testing.make_inputs(case, dtype, device, seed).items()}
