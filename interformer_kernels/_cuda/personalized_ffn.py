"""Personalised feed-forward on the CUDA part: see `csrc/cuda/personalized_ffn.cu`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._calls import FfnCall, FfnGradients, FfnOutputs
from interformer_kernels._launch import splits
from interformer_kernels._launch.ffn import empty_gradients, viewed
from interformer_kernels._launch.tensors import allows_tf32, readable


class Workspace(NamedTuple):
    """Memory of a backward call, and the number of tokens every which rows are split."""

    grad_pre_activation: Tensor | None
    split_tokens: int
    partials: Tensor | None


def forward(call: FfnCall, residual: Tensor | None) -> Tensor:
    """The output `[T, F]`."""
    out = call.x.new_empty(call.out_shape())
    outputs = FfnOutputs(readable(residual), out)
    _C.cuda_personalized_ffn_forward(viewed(call, readable), outputs, allows_tf32(call.x.dtype))
    return out


def backward(call: FfnCall, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x, weight, bias`; an empty one for a bias that was not given."""
    grad_x, grad_weight, grad_bias = empty_gradients(call)
    gradients = FfnGradients(readable(grad_out), grad_x, grad_weight, None if call.bias is None else grad_bias)
    tokens, partials = call.x.shape[0], None
    if tokens > splits.SPLIT_TOKENS:
        inner, columns = call.weight.shape[1:]
        numbers = inner * columns + (0 if call.bias is None else columns)
        partials = call.x.new_empty((splits.num_partials(tokens, splits.SPLIT_TOKENS), numbers), dtype=torch.float32)
    workspace = Workspace(
        grad_pre_activation=None if call.activation == "identity" else grad_out.new_empty(grad_out.shape),
        split_tokens=splits.SPLIT_TOKENS,
        partials=partials,
    )
    _C.cuda_personalized_ffn_backward(viewed(call, readable), gradients, workspace, allows_tf32(call.x.dtype))
    return grad_x, grad_weight, grad_bias
