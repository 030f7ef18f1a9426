"""`torch.nn.attention.varlen`: PyTorch's flash attention over packed rows; 16-bit numbers, on GPUs only.

It wants to be told the longest length. Who does not know it reads it from the device, and waits for it.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor


def attend_jagged(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, longest: int | None = None) -> Tensor:
    """All rows in one call."""
    ends = offsets.int()
    most = int(offsets.diff().max()) if longest is None else longest
    return _attend(q, k, v, ends, ends, most, most, scale)


def attend_dense(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, longest: int | None = None) -> Tensor:
    """Queries `[B, N, H, D]` become rows of N."""
    rows, queries = q.shape[:2]
    own = torch.arange(0, rows * queries + 1, queries, device=q.device, dtype=torch.int32)
    most = int(offsets.diff().max()) if longest is None else longest
    out = _attend(q.flatten(0, 1), k, v, own, offsets.int(), queries, most, scale)
    return out.view(q.shape[:3] + v.shape[2:])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, most_q: int, most_k: int, scale: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Older versions take no scale: theirs is the usual one.
    usual = not _takes_scale() and scale == q.shape[-1] ** -0.5
    out = varlen_attn(q, k, v, q_ends, k_ends, most_q, most_k, **({} if usual else {"scale": scale}))
    assert isinstance(out, Tensor)
    return out


@functools.cache
def _takes_scale() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "scale" in inspect.signature(varlen_attn).parameters
