"""`torch.nn.attention.varlen`: PyTorch's flash attention over packed rows, for 16-bit dtypes on GPUs only.

It takes the longest length as an argument. Where the caller does not know it, reading it from the device synchronises.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor


def attend_jagged(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, longest: int | None = None) -> Tensor:
    """All rows in one call."""
    cu_seqlens = offsets.int()
    max_length = int(offsets.diff().max()) if longest is None else longest
    return _attend(q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, scale)


def attend_dense(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, longest: int | None = None) -> Tensor:
    """Queries `[B, N, H, D]` become rows of N tokens."""
    rows, queries = q.shape[:2]
    q_offsets = torch.arange(0, rows * queries + 1, queries, device=q.device, dtype=torch.int32)
    max_length = int(offsets.diff().max()) if longest is None else longest
    out = _attend(q.flatten(0, 1), k, v, q_offsets, offsets.int(), queries, max_length, scale)
    return out.view(q.shape[:3] + v.shape[2:])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, max_q: int, max_k: int, scale: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Older versions have no `scale`: they always use the default one.
    default_scale = not _takes_scale() and scale == q.shape[-1] ** -0.5
    out = varlen_attn(q, k, v, q_offsets, k_offsets, max_q, max_k, **({} if default_scale else {"scale": scale}))
    assert isinstance(out, Tensor)
    return out


@functools.cache
def _takes_scale() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "scale" in inspect.signature(varlen_attn).parameters
