"""Personalised feed-forward on the CUDA part: see `csrc/cuda/personalized_ffn.cu`."""

from __future__ import annotations

from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._launch.tensors import allows_tf32, readable


def forward(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """The output `[T, F]`."""
    out = x.new_empty(x.shape[0], weight.shape[2])
    _C.cuda_personalized_ffn_forward(
        readable(x), readable(weight), offsets, readable(bias), activation, readable(residual), out,
        allows_tf32(x.dtype),
    )  # fmt: skip
    return out


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x, weight, bias`; an empty one for a bias that was not given."""
    grad_x, grad_weight, grad_bias = (x.new_empty(0 if t is None else t.shape) for t in (x, weight, bias))
    _C.cuda_personalized_ffn_backward(
        readable(x),
        readable(weight),
        offsets,
        readable(bias),
        activation,
        readable(grad_out),
        None if activation == "identity" else grad_out.new_empty(grad_out.shape),
        grad_x,
        grad_weight,
        None if bias is None else grad_bias,
        allows_tf32(x.dtype),
    )
    return grad_x, grad_weight, grad_bias
