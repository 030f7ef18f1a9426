"""Queries, keys and values as slices of one tensor, and back: their gradients are not copied together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interformer_kernels.ops import _autograd as autograd


def unbind_slices(x: Tensor) -> tuple[Tensor, ...]:
    """The slices `[T, H, D]` of `x [T, n, H, D]`, as views; the same as `x.unbind(1)`.

    Where the gradients of the slices lie side by side, as those of attention in plain eager calls on the CPU do, the
    gradient of `x` is that memory; PyTorch's own `unbind` copies them to a new tensor.
    """
    if torch.compiler.is_compiling() or not (autograd.is_eager() and autograd.wants_gradients((x,))):
        return x.unbind(1)
    slices: tuple[Tensor, ...] = _Unbind.apply(x)  # type: ignore[no-untyped-call]
    return slices


class _Unbind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        return x.unbind(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        whole = None if torch.is_grad_enabled() else _side_by_side(grads)
        return torch.stack(grads, 1) if whole is None else whole


def _side_by_side(slices: tuple[Tensor, ...]) -> Tensor | None:
    """The tensor `[T, n, H, D]` of which these are all slices, in order; None where there is none."""
    first = slices[0]
    tokens, heads, channels = first.shape
    slice_size, memory = heads * channels, first.untyped_storage().data_ptr()
    strides = (len(slices) * slice_size, channels, 1)
    for number, x in enumerate(slices):
        if (
            x.stride() != strides
            or x.storage_offset() != first.storage_offset() + number * slice_size
            or x.untyped_storage().data_ptr() != memory
        ):
            return None
    return first.as_strided((tokens, len(slices), heads, channels), (strides[0], slice_size, channels, 1))
