"""Padded batches: SDPA with a mask, the same in plain tensor operations, and the batched product of `personalized_ffn`.

Tokens are gathered into the padded batch and back by one index each. This was the fastest of the ways tried (zeros with
`index_copy`, `index_put`, `pad_sequence`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

# Attention over padded tensors: q [B, H, N, D], k and v [B, H, L, D], mask [B, 1, 1, L] (True at a key; where rows are
# grouped by length None if no row is padded), scale.
PaddedAttention = Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]


def sdpa_with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """PyTorch's own attention."""
    return sdpa(q, k, v, attn_mask=mask, scale=scale)


def eager_with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention in plain tensor operations; masked scores are finite, so that rows without keys are not NaN."""
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


def eager_in_group(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same, without a mask where no row is padded; every row has keys."""
    scores = q @ k.transpose(-1, -2) * scale
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


class Padding:
    """The places of a jagged batch's tokens in a padded batch with `width` places a row."""

    def __init__(self, offsets: Tensor, width: int, tokens: int) -> None:
        lengths = offsets.diff()
        self.rows, self.width = len(lengths), width
        places = torch.arange(width, device=offsets.device)
        self.mask = places < lengths[:, None]
        # Padding reads an arbitrary token: it is masked, or not read back.
        self.source = (offsets[:-1, None] + places).clamp(max=tokens - 1).flatten()
        row = torch.repeat_interleave(torch.arange(self.rows, device=offsets.device), lengths, output_size=tokens)
        self.back = torch.arange(tokens, device=offsets.device) + (row * width - offsets[row])

    def pad(self, x: Tensor) -> Tensor:
        """Convert `[T, ...]` to `[B, L, ...]`."""
        return x.index_select(0, self.source).view(self.rows, self.width, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """Convert `[B, L, ...]` to `[T, ...]`."""
        return x.flatten(0, 1).index_select(0, self.back)


def longest(offsets: Tensor, multiple: int = 1) -> int:
    """The longest length, rounded up to a multiple of `multiple`: the width of the padded batch."""
    return -(-int(offsets.diff().max()) // multiple) * multiple


def attend_jagged(
    attention: PaddedAttention, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, width: int, scale: float
) -> Tensor:
    """Pad q, k and v, attend, unpad."""
    padding = Padding(offsets, width, len(k))
    queries, keys, values = (padding.pad(x).transpose(1, 2) for x in (q, k, v))
    return padding.unpad(attention(queries, keys, values, padding.mask[:, None, None], scale).transpose(1, 2))


def attend_dense(
    attention: PaddedAttention, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, width: int, scale: float
) -> Tensor:
    """Queries `[B, N, H, D]` over padded keys; rows without keys get zeros."""
    padding = Padding(offsets, width, len(k))
    mask = padding.mask[:, None, None]
    keys, values = (padding.pad(x).transpose(1, 2) for x in (k, v))
    out = attention(q.transpose(1, 2), keys, values, mask, scale)
    return out.where(mask.any(-1, keepdim=True), 0).transpose(1, 2)


def ffn(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor, width: int) -> Tensor:
    """Pad, one batched product, unpad."""
    padding = Padding(offsets, width, len(x))
    return padding.unpad(torch.baddbmm(bias[:, None], padding.pad(x), weight))
