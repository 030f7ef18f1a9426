"""Fused linear layers on the native module: see `csrc/cpu/fused_linear.h`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._calls import LinearCall, LinearGradients, LinearOutputs
from interformer_kernels._launch.tensors import resolved


def _tensors(call: LinearCall) -> tuple[Any, ...]:
    """The leading fields of the call: `x, weight, bias, norm_weight, norm_bias, gate`."""
    return call[:6]


def _viewed(call: LinearCall) -> LinearCall:
    return LinearCall._make((*map(resolved, _tensors(call)), call.eps, call.activation))


def forward(call: LinearCall, residual: Tensor | None) -> Tensor:
    """The output `[T, F]`."""
    out = call.x.new_empty(call.out_shape())
    _C.fused_linear_forward(_viewed(call), LinearOutputs(resolved(residual), out), torch.get_num_threads())
    return out


def backward(call: LinearCall, grad_out: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `x, weight, bias, norm_weight, norm_bias, gate`; an empty one for an input that was not given."""
    grads: list[Any] = [None if x is None else call.x.new_empty(x.shape) for x in _tensors(call)]
    _C.fused_linear_backward(_viewed(call), LinearGradients(resolved(grad_out), *grads), torch.get_num_threads())
    return tuple(call.x.new_empty(0) if grad is None else grad for grad in grads)
