"""Personalised feed-forward on the native module: see `csrc/cpu/personalized_ffn.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._calls import FfnCall, FfnGradients, FfnOutputs
from interformer_kernels._launch.ffn import empty_gradients, viewed
from interformer_kernels._launch.tensors import resolved


def forward(call: FfnCall, residual: Tensor | None) -> Tensor:
    """The output `[T, F]`."""
    out = call.x.new_empty(call.out_shape())
    _C.personalized_ffn_forward(viewed(call, resolved), FfnOutputs(resolved(residual), out), torch.get_num_threads())
    return out


def backward(call: FfnCall, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x, weight, bias`; an empty one for a bias that was not given."""
    grad_x, grad_weight, grad_bias = empty_gradients(call)
    gradients = FfnGradients(resolved(grad_out), grad_x, grad_weight, None if call.bias is None else grad_bias)
    _C.personalized_ffn_backward(viewed(call, resolved), gradients, torch.get_num_threads())
    return grad_x, grad_weight, grad_bias
