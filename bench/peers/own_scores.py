"""Softmax of given scores, and sums of values with given weights: padded, and by the index of each token's row."""

from __future__ import annotations

import torch
from interformer_bench.peers.padded import Padding
from torch import Tensor


def padded_softmax(scores: Tensor, offsets: Tensor, width: int) -> Tensor:
    """Pad, mask, softmax, unpad; masked scores are finite, so that rows without tokens are not NaN."""
    padding = Padding(offsets, width, len(scores))
    masked = padding.pad(scores).masked_fill(~padding.mask[..., None], torch.finfo(scores.dtype).min)
    return padding.unpad(masked.softmax(1))


def padded_sum(weights: Tensor, v: Tensor, offsets: Tensor, width: int) -> Tensor:
    """Pad, mask the weights, one batched product."""
    padding = Padding(offsets, width, len(v))
    masked = padding.pad(weights).masked_fill(~padding.mask[..., None], 0)
    return torch.einsum("blh,blhd->bhd", masked, padding.pad(v))


def _row_of_tokens(offsets: Tensor, tokens: int) -> Tensor:
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=tokens)


def scattered_softmax(scores: Tensor, offsets: Tensor) -> Tensor:
    """Maxima and sums of rows by the index of each token's row, in float32."""
    row, exact = _row_of_tokens(offsets, len(scores)), scores.float()
    index = row[:, None].expand_as(exact)
    empty = exact.new_full((len(offsets) - 1, exact.shape[1]), -torch.inf)
    largest = empty.scatter_reduce(0, index, exact.detach(), "amax")
    e = (exact - largest.index_select(0, row)).exp()
    total = torch.zeros_like(empty).index_add(0, row, e)
    return (e / total.index_select(0, row)).to(scores.dtype)


def scattered_sum(weights: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Weighted values, added at the index of each token's row, in float32."""
    weighted = weights.float()[..., None] * v.float()
    sums = weighted.new_zeros(len(offsets) - 1, *v.shape[1:])
    return sums.index_add(0, _row_of_tokens(offsets, len(v)), weighted).to(v.dtype)


def rows_softmax(scores: Tensor, offsets: Tensor) -> Tensor:
    """Row by row."""
    return torch.cat([row.softmax(0) for row in scores.split(offsets.diff().tolist())])


def rows_sum(weights: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Row by row."""
    lengths = offsets.diff().tolist()
    rows = zip(weights.split(lengths), v.split(lengths), strict=True)
    return torch.stack([torch.einsum("lh,lhd->hd", w, x) for w, x in rows])
