"""Personalised feed-forward on the CUDA part: see `csrc/cuda/personalized_ffn.cu`."""

from __future__ import annotations

from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._launch import personalized_ffn
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
    _C.cuda_personalized_ffn_backward(
        *inputs, readable(grad_out), before, grad_x, grad_weight, grad_bias, allows_tf32(x.dtype)
    )


forward, backward = personalized_ffn.launcher(_write, _write_gradients)
