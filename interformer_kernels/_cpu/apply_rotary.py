"""Rotary embedding on the native module: see `csrc/cpu/apply_rotary.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._launch import apply_rotary
from interformer_kernels._launch.tensors import readable, resolved


def _rotated(
    x: Tensor, offsets: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, backwards: bool
) -> Tensor:
    out = x.new_empty(x.shape)
    tables = readable(cos), readable(sin)
    _C.apply_rotary(resolved(x), offsets, *tables, positions, interleaved, backwards, out, torch.get_num_threads())
    return out


forward, backward = apply_rotary.launcher(_rotated)
