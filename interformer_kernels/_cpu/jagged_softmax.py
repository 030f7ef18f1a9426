"""Softmax of rows on the native module: see `csrc/cpu/jagged_softmax.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._calls import SoftmaxCall, SoftmaxGradients, SoftmaxOutputs
from interformer_kernels._launch.tensors import readable, readable_call


def forward(call: SoftmaxCall) -> Tensor:
    """The output `[T, H]`."""
    out = call.scores.new_empty(call.scores.shape)
    _C.jagged_softmax_forward(readable_call(call), SoftmaxOutputs(out), torch.get_num_threads())
    return out


def backward(call: SoftmaxCall, grad_out: Tensor) -> Tensor:
    """The gradient of `scores`."""
    grad_scores = call.scores.new_empty(call.scores.shape)
    gradients = SoftmaxGradients(readable(grad_out), grad_scores)
    _C.jagged_softmax_backward(readable_call(call), gradients, torch.get_num_threads())
    return grad_scores
