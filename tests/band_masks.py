"""Masks that are bands, for tests of `nn.MultiheadAttention`."""

from __future__ import annotations

from typing import Any

import torch
from module_budget import perturbed
from torch import Tensor, nn

from interformer_kernels.nn._mask_forms import BandMask

E, H = 8, 2
BANDS = {"causal": (None, 0), "causal window": (-2, 0), "window": (-1, 2)}


def visible_of(form: BandMask, length: int, width: int, rows: int = 1) -> Tensor:
    """The entries `[B, L, S]` that a form stands for."""
    distance = torch.arange(width) - torch.arange(length)[:, None]
    visible = torch.ones(rows, length, width, dtype=torch.bool)
    if form.lower is not None:
        visible &= distance >= form.lower
    if form.upper is not None:
        visible &= distance <= form.upper
    if form.keys is not None:
        visible &= form.keys[:, None]
    if form.queries is not None:
        visible &= form.queries[:, :, None]
    return visible


def band(length: int, width: int, lower: int | None = None, upper: int | None = None) -> Tensor:
    """bool `[L, S]`, True where the band hides."""
    return ~visible_of(BandMask(lower, upper), length, width)[0]


def additive(hidden: Tensor, dtype: torch.dtype = torch.float32, number: float = -torch.inf) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, number)


def attention(**options: Any) -> nn.MultiheadAttention:
    return perturbed(nn.MultiheadAttention(E, H, batch_first=True, **options))
