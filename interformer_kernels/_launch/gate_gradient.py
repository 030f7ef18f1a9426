"""The gate's gradient where kernels leave sums of it: along tokens and channels that the gate broadcasts over."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gate_sums(gate: Tensor, shape: tuple[int, ...], block: int) -> tuple[Tensor, bool, bool]:
    """Memory for the gradient of a gate that broadcasts to `shape`, and whether kernels sum tokens and channels.

    Tokens are summed block by block of `block` of them. A gate of that very shape has its gradient there, rounded.
    """
    if gate.shape == shape:
        return gate.new_empty(shape), False, False
    own = (1,) * (len(shape) - gate.dim()) + tuple(gate.shape)
    over_tokens = all(size == 1 for size in own[:-2])
    over_channels = own[-1] == 1
    tokens = (-(-math.prod(shape[:-2]) // block), *(1,) * (len(shape) - 3)) if over_tokens else shape[:-2]
    sums = gate.new_empty((*tokens, shape[-2], 1 if over_channels else shape[-1]), dtype=torch.float32)
    return sums, over_tokens, over_channels


def gate_gradient(gate: Tensor, sums: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The gate's gradient in its own shape, from the kernels' sums; added by torch, in a fixed order."""
    if gate.shape == shape:
        return sums
    own = (1,) * (len(shape) - gate.dim()) + tuple(gate.shape)
    axes = [axis for axis, size in enumerate(own) if size == 1 and sums.shape[axis] != 1]
    summed = sums.sum(axes, keepdim=True) if axes else sums
    return summed.view(gate.shape).to(gate.dtype)
