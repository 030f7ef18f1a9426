"""`torch.nn.attention.varlen`: PyTorch's flash attention over packed rows; 16-bit numbers, on GPUs only."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_jagged(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """All rows in one call; the longest length is read from the device, as its users do."""
    from torch.nn.attention.varlen import varlen_attn

    ends = offsets.int()
    longest = int(offsets.diff().max())
    out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale)
    assert isinstance(out, Tensor)
    return out


def attend_dense(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """Queries `[B, N, H, D]` become rows of N."""
    from torch.nn.attention.varlen import varlen_attn

    rows, queries = q.shape[:2]
    own = torch.arange(0, rows * queries + 1, queries, device=q.device, dtype=torch.int32)
    longest = int(offsets.diff().max())
    out = varlen_attn(q.flatten(0, 1), k, v, own, offsets.int(), queries, longest, scale=scale)
    assert isinstance(out, Tensor)
    return out.view(q.shape[:3] + v.shape[2:])
