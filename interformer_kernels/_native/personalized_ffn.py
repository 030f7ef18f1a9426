"""Personalised feed-forward on the native module: see `csrc/cpu/personalized_ffn.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._launch import personalized_ffn
from interformer_kernels._launch.tensors import resolved


def _write(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    inputs = resolved(x), resolved(weight), offsets, resolved(bias), activation
    _C.personalized_ffn_forward(*inputs, resolved(residual), out, torch.get_num_threads())


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
    inputs = resolved(x), resolved(weight), offsets, resolved(bias), activation
    _C.personalized_ffn_backward(*inputs, resolved(grad_out), grad_x, grad_weight, grad_bias, torch.get_num_threads())


forward, backward = personalized_ffn.launcher(_write, _write_gradients)
