"""InterFormer as written without these kernels: padded rows, `scaled_dot_product_attention`, batched products.

Parameters, their names and the dense parts are the same. The modules that read histories get another class, which works
on `[B, S+L, E]` with a mask. Axes: `B` rows, `L` the longest history, `S` CLS tokens, `E` width, `H` heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from interformer import InterFormer, InterFormerConfig, Schema
from interformer.batch import Batch
from interformer.cross import PMA
from interformer.feed_forward import MLPFeedForward
from interformer.layers import Rope
from interformer.sequence import SelfAttention
from torch import Tensor

# The one form of the model that is implemented on padded rows: the default.
_FORM = {"flow": "int", "cls": True, "summary": "selective", "pma": "bare", "pffn": "mlp", "window": ()}


@dataclass(frozen=True)
class PaddedLayout:
    """The counterpart of `interformer.batch.Layout` on padded rows: CLS tokens first, padding last.

    Args:
        offsets: the attention mask in the place of offsets: `[B, 1, 1, S+L]` bool, True at a token; None without
            padding.
        summary: `[B, S+K]`: places of the CLS tokens and of the last `K` events in their rows; 0 for missing ones.
        valid: `[B, S+K]` bool, False for missing events.
    """

    offsets: Tensor | None
    summary: Tensor
    valid: Tensor

    @classmethod
    def of(cls, lengths: Tensor, longest: int, full: bool, config: InterFormerConfig) -> PaddedLayout:
        num_cls, num_recent = config.num_cls, config.num_recent
        mask = torch.arange(num_cls + longest) < num_cls + lengths[:, None]
        cls_places = torch.arange(num_cls).expand(len(lengths), -1)
        summary = torch.cat((cls_places, num_cls + lengths[:, None] - num_recent + torch.arange(num_recent)), 1)
        valid = (summary >= num_cls) | (torch.arange(num_cls + num_recent) < num_cls)
        return cls(None if full else mask[:, None, None], summary.where(valid, 0), valid)

    def prepend(self, cls_tokens: Tensor, events: Tensor) -> Tensor:
        return torch.cat((cls_tokens, events.unflatten(0, (len(cls_tokens), -1))), 1)

    def take_summary(self, tokens: Tensor) -> Tensor:
        events = tokens.gather(1, self.summary[..., None].expand(-1, -1, tokens.shape[-1]))
        return events.where(self.valid[..., None], 0)


class PaddedInterFormer(InterFormer):
    """`Batch -> logits [B]` for a batch made by `padded`.

    Args:
        full: whether all rows are as long as the longest, so that attention needs no mask.

    Raises:
        ValueError: a form of the model that is not implemented on padded rows.
    """

    def __init__(self, config: InterFormerConfig, schema: Schema, full: bool) -> None:
        for name, required in _FORM.items():
            if getattr(config, name) != required:
                raise ValueError(f"{name} must be {required!r} on padded rows, found {getattr(config, name)!r}")
        super().__init__(replace(config, backend="reference"), schema)  # PyTorch's layers alone, none of this package
        self.full = full
        for module in self.modules():
            module.__class__ = _PADDED.get(type(module), type(module))

    def _layout(self, batch: Batch) -> Any:
        lengths = batch.offsets.diff()
        return PaddedLayout.of(lengths, batch.sequences.shape[0] // len(lengths), self.full, self.config)


def padded(batch: Batch) -> Batch:
    """The batch with the events of every row padded at the end to the longest: `sequences [B * L, k]`."""
    lengths = batch.offsets.diff()
    longest = max(int(lengths.max()), 1)
    events = batch.sequences.new_zeros(len(lengths), longest, batch.sequences.shape[1])
    events[torch.arange(longest) < lengths[:, None]] = batch.sequences[: batch.offsets[-1]]
    return replace(batch, sequences=events.flatten(0, 1))


def _heads(x: Tensor, count: int, heads: int) -> tuple[Tensor, ...]:
    """Split `[B, N, count * E]` into `count` tensors `[B, H, N, D]`."""
    return x.unflatten(-1, (count, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    cos, sin = (table[: x.shape[-2]] for table in rope)
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


class _PaddedPMA(PMA):
    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        query = self.query(self.seeds).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)  # [H, M, D]
        k, v = _heads(self.key_value(tokens), 2, self.num_heads)
        attn_out = F.scaled_dot_product_attention(query.expand(len(k), -1, -1, -1), k, v, mask, scale=self.scale)
        return self.out(attn_out.transpose(1, 2).flatten(-2))


class _PaddedSelfAttention(SelfAttention):
    def forward(self, tokens: Tensor, mask: Tensor | None, rope: Rope | None = None) -> Tensor:
        q, k, v = _heads(self.qkv(tokens), 3, self.num_heads)
        if rope is not None:
            q, k = _rotate(q, rope), _rotate(k, rope)
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(-2))


class _PaddedFeedForward(MLPFeedForward):
    def forward(self, tokens: Tensor, x_sum: Tensor, mask: Tensor | None) -> Tensor:
        (weight,) = self.generate(x_sum)
        return tokens @ weight.unflatten(1, (tokens.shape[-1], -1))


_PADDED: dict[type, type] = {
    PMA: _PaddedPMA,
    SelfAttention: _PaddedSelfAttention,
    MLPFeedForward: _PaddedFeedForward,
}
