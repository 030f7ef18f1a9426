"""Personalised feed-forward on the CUDA part: see `csrc/cuda/personalized_ffn.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._calls import FfnCall
from interformer_kernels._launch import long_rows
from interformer_kernels._launch.ffn import empty_gradients, viewed
from interformer_kernels._launch.tensors import allows_tf32, readable


def forward(call: FfnCall, residual: Tensor | None) -> Tensor:
    """The output `[T, F]`."""
    out = call.x.new_empty(call.out_shape())
    tf32 = allows_tf32(call.x.dtype)
    _C.cuda_personalized_ffn_forward(*viewed(call, readable), readable(residual), out, tf32)
    return out


def backward(call: FfnCall, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x, weight, bias`; an empty one for a bias that was not given."""
    grad_x, grad_weight, grad_bias = empty_gradients(call)
    written = grad_x, grad_weight, None if call.bias is None else grad_bias
    before = None if call.activation == "identity" else grad_out.new_empty(grad_out.shape)
    tokens, split, pieces = call.x.shape[0], long_rows.TOKENS, None
    if tokens > split:
        inner, columns = call.weight.shape[1:]
        numbers = inner * columns + (0 if call.bias is None else columns)
        pieces = call.x.new_empty((long_rows.pieces(tokens, split), numbers), dtype=torch.float32)
    tf32 = allows_tf32(call.x.dtype)
    _C.cuda_personalized_ffn_backward(
        *viewed(call, readable), readable(grad_out), before, *written, split, pieces, tf32
    )
    return grad_x, grad_weight, grad_bias
