"""Personalised feed-forward on the CUDA part: see `csrc/cuda/personalized_ffn.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._launch import long_rows, personalized_ffn
from interformer_kernels._launch.tensors import allows_tf32, readable


def _write(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    inputs = readable(x), readable(weight), offsets, readable(bias), activation
    _C.cuda_personalized_ffn_forward(*inputs, readable(residual), out, allows_tf32(x.dtype))


def _write_gradients(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    activation: str,
    grad_out: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
) -> None:
    inputs = readable(x), readable(weight), offsets, readable(bias), activation
    before = None if activation == "identity" else grad_out.new_empty(grad_out.shape)
    tokens, split, pieces = x.shape[0], long_rows.TOKENS, None
    if tokens > split:
        numbers = grad_weight.shape[1] * grad_weight.shape[2] + (0 if grad_bias is None else grad_bias.shape[1])
        pieces = x.new_empty((long_rows.pieces(tokens, split), numbers), dtype=torch.float32)
    _C.cuda_personalized_ffn_backward(
        *inputs, readable(grad_out), before, grad_x, grad_weight, grad_bias, split, pieces, allows_tf32(x.dtype)
    )


forward, backward = personalized_ffn.launcher(_write, _write_gradients)
