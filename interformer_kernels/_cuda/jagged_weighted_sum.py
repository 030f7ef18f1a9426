"""Weighted sums of rows on the CUDA part: see `csrc/cuda/jagged_weighted_sum.cu`."""

from __future__ import annotations

from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._calls import WeightedSumCall, WeightedSumGradients, WeightedSumOutputs
from interformer_kernels._launch.tensors import readable, readable_call


def forward(call: WeightedSumCall) -> Tensor:
    """The output `[B, H, D]`."""
    out = call.v.new_empty(call.out_shape())
    _C.cuda_jagged_weighted_sum_forward(readable_call(call), WeightedSumOutputs(out))
    return out


def backward(call: WeightedSumCall, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `weights` and `v`."""
    grads = call.weights.new_empty(call.weights.shape), call.v.new_empty(call.v.shape)
    _C.cuda_jagged_weighted_sum_backward(readable_call(call), WeightedSumGradients(readable(grad_out), *grads))
    return grads
