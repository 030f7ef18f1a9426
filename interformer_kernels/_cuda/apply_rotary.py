"""Rotary embedding on the CUDA part: see `csrc/cuda/apply_rotary.cu`."""

from __future__ import annotations

from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._calls import RotaryCall, RotaryOutputs
from interformer_kernels._launch.tensors import readable


def rotated(
    x: Tensor, offsets: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, backwards: bool
) -> Tensor:
    """`x [T, H, D]` rotated by each token's position, or rotated back; zero on the tail."""
    out = x.new_empty(x.shape)
    call = RotaryCall(readable(x), offsets, readable(cos), readable(sin), positions, interleaved)
    _C.cuda_apply_rotary(call, RotaryOutputs(out, backwards))
    return out


def forward(call: RotaryCall) -> Tensor:
    """The output `[T, H, D]`."""
    return rotated(call.x, call.offsets, call.cos, call.sin, call.positions, call.interleaved, backwards=False)


def backward(call: RotaryCall, grad_out: Tensor) -> Tensor:
    """The gradient of `x`: the output's, rotated back."""
    return rotated(grad_out, call.offsets, call.cos, call.sin, call.positions, call.interleaved, backwards=True)
