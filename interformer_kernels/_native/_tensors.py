"""What the adapters share: tensors made fit for a view of their raw memory."""

from __future__ import annotations

import torch
from torch import Tensor


def resolved(x: Tensor) -> Tensor:
    """`x` with its negation carried out, where it is a lazily negated view: raw memory does not show it."""
    return x.resolve_neg()


def readable(x: Tensor) -> Tensor:
    """`x` as kernels read it in place: any strides, but a contiguous last axis; a copy where that does not hold."""
    x = resolved(x)
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels add up in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expanded(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """`x` broadcast to `shape` by strides of 0."""
    return None if x is None else resolved(x).expand(shape)


def broadcast_axes_as_ones(x: Tensor, axes: int) -> Tensor:
    """`x` with leading axes of size 1 up to `axes` axes."""
    return x.view((1,) * (axes - x.dim()) + tuple(x.shape))
