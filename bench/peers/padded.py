"""Padded batches: SDPA with a mask, the same in plain tensor operations, and the batched product of `personalized_ffn`.

Tokens are gathered into their places and gathered back, by one index each: the fastest of the ways tried (zeros and
`index_copy`, `index_put`, `pad_sequence`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

# Attention over padded tensors: q [B, H, N, D], k and v [B, H, L, D], and which keys are there [B, 1, 1, L].
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def sdpa_with_mask(q: Tensor, k: Tensor, v: Tensor, held: Tensor, scale: float) -> Tensor:
    """PyTorch's own attention."""
    return sdpa(q, k, v, attn_mask=held, scale=scale)


def eager_with_mask(q: Tensor, k: Tensor, v: Tensor, held: Tensor, scale: float) -> Tensor:
    """The same, written out; the mask is a large number, so that rows without keys are no NaN."""
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~held, torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


class Padding:
    """Where the tokens of a jagged batch stand in a padded one of `width` places a row."""

    def __init__(self, offsets: Tensor, width: int, tokens: int) -> None:
        lengths = offsets.diff()
        self.rows, self.width = len(lengths), width
        places = torch.arange(width, device=offsets.device)
        self.held = places < lengths[:, None]
        # Where there is no token, any other one: it is masked, or not read back.
        self.source = (offsets[:-1, None] + places).clamp(max=tokens - 1).flatten()
        row = torch.repeat_interleave(torch.arange(self.rows, device=offsets.device), lengths, output_size=tokens)
        self.back = torch.arange(tokens, device=offsets.device) + (row * width - offsets[row])

    def pad(self, x: Tensor) -> Tensor:
        """`[T, ...]` to `[B, L, ...]`."""
        return x.index_select(0, self.source).view(self.rows, self.width, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """`[B, L, ...]` to `[T, ...]`."""
        return x.flatten(0, 1).index_select(0, self.back)


def longest(offsets: Tensor, multiple: int = 1) -> int:
    """The width of the padded batch, in multiples of `multiple`."""
    return -(-int(offsets.diff().max()) // multiple) * multiple


def attend_jagged(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, width: int, scale: float
) -> Tensor:
    """Pad all three, attend, unpad."""
    padding = Padding(offsets, width, len(k))
    queries, keys, values = (padding.pad(x).transpose(1, 2) for x in (q, k, v))
    return padding.unpad(attention(queries, keys, values, padding.held[:, None, None], scale).transpose(1, 2))


def attend_dense(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, width: int, scale: float
) -> Tensor:
    """Queries `[B, N, H, D]` over padded keys; rows without keys get zeros."""
    padding = Padding(offsets, width, len(k))
    held = padding.held[:, None, None]
    keys, values = (padding.pad(x).transpose(1, 2) for x in (k, v))
    out = attention(q.transpose(1, 2), keys, values, held, scale)
    return out.where(held.any(-1, keepdim=True), 0).transpose(1, 2)


def ffn(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor, width: int) -> Tensor:
    """Pad, one batched product, unpad."""
    padding = Padding(offsets, width, len(x))
    return padding.unpad(torch.baddbmm(bias[:, None], padding.pad(x), weight))
