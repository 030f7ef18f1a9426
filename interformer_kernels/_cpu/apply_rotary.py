"""Rotary embedding on the native module: see `csrc/cpu/apply_rotary.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._calls import RotaryCall, RotaryOutputs
from interformer_kernels._launch.tensors import readable, resolved


def _rotated(x: Tensor, call: RotaryCall, backwards: bool) -> Tensor:
    out = x.new_empty(x.shape)
    call = call._replace(x=resolved(x), cos=readable(call.cos), sin=readable(call.sin))
    _C.apply_rotary(call, RotaryOutputs(out, backwards), torch.get_num_threads())
    return out


def forward(call: RotaryCall) -> Tensor:
    """The output `[T, H, D]`."""
    return _rotated(call.x, call, backwards=False)


def backward(call: RotaryCall, grad_out: Tensor) -> Tensor:
    """The gradient of `x`: the output's, rotated back."""
    return _rotated(grad_out, call, backwards=True)
