"""Weighted sums of rows on the native module: see `csrc/cpu/jagged_weighted_sum.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._calls import WeightedSumCall, WeightedSumGradients, WeightedSumOutputs
from interformer_kernels._launch.tensors import readable, readable_call


def forward(call: WeightedSumCall) -> Tensor:
    """The output `[B, H, D]`."""
    out = call.v.new_empty(call.out_shape())
    _C.jagged_weighted_sum_forward(readable_call(call), WeightedSumOutputs(out), torch.get_num_threads())
    return out


def backward(call: WeightedSumCall, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `weights` and `v`."""
    grads = call.weights.new_empty(call.weights.shape), call.v.new_empty(call.v.shape)
    _C.jagged_weighted_sum_backward(
        readable_call(call), WeightedSumGradients(readable(grad_out), *grads), torch.get_num_threads()
    )
    return grads
