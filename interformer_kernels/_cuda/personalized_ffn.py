"""Personalised feed-forward on the CUDA part: see `csrc/cuda/personalized_ffn.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._launch import long_rows
from interformer_kernels._launch.personalized_ffn import FfnCall, FfnGradients, launcher
from interformer_kernels._launch.tensors import allows_tf32, readable


def _write(call: FfnCall, residual: Tensor | None, out: Tensor) -> None:
    tf32 = allows_tf32(call.x.dtype)
    _C.cuda_personalized_ffn_forward(*call.arguments(readable), readable(residual), out, tf32)


def _write_gradients(call: FfnCall, grad_out: Tensor, gradients: FfnGradients) -> None:
    before = None if call.activation == "identity" else grad_out.new_empty(grad_out.shape)
    tokens, split, pieces = call.x.shape[0], long_rows.TOKENS, None
    if tokens > split:
        inner, columns = call.weight.shape[1:]
        numbers = inner * columns + (0 if call.bias is None else columns)
        pieces = call.x.new_empty((long_rows.pieces(tokens, split), numbers), dtype=torch.float32)
    tf32 = allows_tf32(call.x.dtype)
    _C.cuda_personalized_ffn_backward(
        *call.arguments(readable), readable(grad_out), before, *gradients, split, pieces, tf32
    )


forward, backward = launcher(_write, _write_gradients)
