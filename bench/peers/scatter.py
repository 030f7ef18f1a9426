"""Pooling by scattered sums: a softmax over segments, no padding, no loop."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(seeds: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """Seeds `[M, H, D]` over packed keys and values: largest score, sum and weighted sum of each row by its index."""
    rows, tokens = len(offsets) - 1, len(k)
    row = torch.repeat_interleave(torch.arange(rows, device=k.device), offsets.diff(), output_size=tokens)
    scores = torch.einsum("thd,mhd->tmh", k, seeds * scale)
    # The largest score only guards the exponential: its gradient is nothing.
    top = scores.detach().new_full((rows, *scores.shape[1:]), -torch.inf)
    top = top.index_reduce(0, row, scores.detach(), "amax")
    weights = (scores - top.index_select(0, row)).exp()
    total = weights.new_zeros(top.shape).index_add(0, row, weights)
    weighted = weights[..., None] * v[:, None]
    summed = weighted.new_zeros(rows, *weighted.shape[1:]).index_add(0, row, weighted)
    return summed / total.clamp(min=torch.finfo(total.dtype).tiny)[..., None]
