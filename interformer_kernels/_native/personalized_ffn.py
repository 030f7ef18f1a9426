"""Personalised feed-forward on the native module: see `csrc/cpu/personalized_ffn.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._launch.tensors import resolved


def forward(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """The output `[T, F]`."""
    out = x.new_empty(x.shape[0], weight.shape[2])
    _C.personalized_ffn_forward(
        resolved(x),
        resolved(weight),
        offsets,
        resolved(bias),
        activation,
        resolved(residual),
        out,
        torch.get_num_threads(),
    )
    return out


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x, weight, bias`; an empty one for a bias that was not given."""
    grad_x, grad_weight, grad_bias = (x.new_empty(0 if t is None else t.shape) for t in (x, weight, bias))
    _C.personalized_ffn_backward(
        resolved(x),
        resolved(weight),
        offsets,
        resolved(bias),
        activation,
        resolved(grad_out),
        grad_x,
        grad_weight,
        None if bias is None else grad_bias,
        torch.get_num_threads(),
    )
    return grad_x, grad_weight, grad_bias
