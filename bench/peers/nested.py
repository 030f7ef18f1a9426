"""Nested tensors, as PyTorch offers them for rows of unequal length (`layout=torch.jagged`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa


def _nested(x: Tensor, offsets: Tensor, shortest: int, longest: int) -> Tensor:
    """Convert `[T, H, D]` to `[B, H, L*, D]`."""
    nested = torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=shortest, max_seqlen=longest)
    return nested.transpose(1, 2)


# The shortest and the longest length; they are read from the tensor where the caller does not know them.
Bounds = tuple[int, int]


def _bounds(offsets: Tensor) -> Bounds:
    lengths = offsets.diff()
    return int(lengths.min()), int(lengths.max())


def attend_jagged(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, bounds: Bounds | None = None
) -> Tensor:
    """SDPA over nested tensors."""
    bounds = _bounds(offsets) if bounds is None else bounds
    queries, keys, values = (_nested(x, offsets, *bounds) for x in (q, k, v))
    out: Tensor = sdpa(queries, keys, values, scale=scale)
    return out.transpose(1, 2).values()


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, bounds: Bounds | None = None
) -> Tensor:
    """Queries `[B, N, H, D]` become rows of N tokens."""
    bounds = _bounds(offsets) if bounds is None else bounds
    rows, queries = q.shape[:2]
    q_offsets = torch.arange(0, rows * queries + 1, queries, device=q.device)
    keys, values = (_nested(x, offsets, *bounds) for x in (k, v))
    out: Tensor = sdpa(_nested(q.flatten(0, 1), q_offsets, queries, queries), keys, values, scale=scale)
    return out.transpose(1, 2).values().view(q.shape[:3] + v.shape[2:])
