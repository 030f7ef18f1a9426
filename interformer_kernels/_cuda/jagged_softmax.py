"""Softmax of rows on the CUDA part: see `csrc/cuda/jagged_softmax.cu`."""

from __future__ import annotations

from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._calls import SoftmaxCall, SoftmaxGradients, SoftmaxOutputs
from interformer_kernels._launch.tensors import readable, readable_call


def forward(call: SoftmaxCall) -> Tensor:
    """The output `[T, H]`."""
    out = call.scores.new_empty(call.scores.shape)
    _C.cuda_jagged_softmax_forward(readable_call(call), SoftmaxOutputs(out))
    return out


def backward(call: SoftmaxCall, grad_out: Tensor) -> Tensor:
    """The gradient of `scores`."""
    grad_scores = call.scores.new_empty(call.scores.shape)
    gradients = SoftmaxGradients(readable(grad_out), grad_scores)
    _C.cuda_jagged_softmax_backward(readable_call(call), gradients)
    return grad_scores
