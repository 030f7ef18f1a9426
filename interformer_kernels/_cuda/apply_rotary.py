"""Rotary embedding on the CUDA part: see `csrc/cuda/apply_rotary.cu`."""

from __future__ import annotations

from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._launch import apply_rotary
from interformer_kernels._launch.tensors import readable


def rotated(
    x: Tensor, offsets: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, backwards: bool
) -> Tensor:
    """`x [T, H, D]` turned by each token's position, or turned back; zero on the tail."""
    out = x.new_empty(x.shape)
    _C.cuda_apply_rotary(readable(x), offsets, readable(cos), readable(sin), positions, interleaved, backwards, out)
    return out


forward, backward = apply_rotary.launcher(rotated)
