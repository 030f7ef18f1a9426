"""Pooling by scattered sums: a softmax over segments, without padding and without a loop."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(seeds: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """Seeds `[M, H, D]` over packed keys and values; rows are reduced by the index of their tokens."""
    rows, tokens = len(offsets) - 1, len(k)
    row = torch.repeat_interleave(torch.arange(rows, device=k.device), offsets.diff(), output_size=tokens)
    scores = torch.einsum("thd,mhd->tmh", k, seeds * scale)
    # The maximum only guards the exponential against overflow: it needs no gradient.
    row_max = scores.detach().new_full((rows, *scores.shape[1:]), -torch.inf)
    row_max = row_max.index_reduce(0, row, scores.detach(), "amax")
    exponentials = (scores - row_max.index_select(0, row)).exp()
    row_sum = exponentials.new_zeros(row_max.shape).index_add(0, row, exponentials)
    weighted = exponentials[..., None] * v[:, None]
    summed = weighted.new_zeros(rows, *weighted.shape[1:]).index_add(0, row, weighted)
    return summed / row_sum.clamp(min=torch.finfo(row_sum.dtype).tiny)[..., None]
