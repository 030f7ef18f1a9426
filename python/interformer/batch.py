"""A batch of impressions with jagged histories, and where its tokens lie once the CLS tokens stand in front.

Axes: `B` rows (impressions), `T` behaviour tokens of all rows, `S` CLS tokens of a row, `K` recent tokens, `k` fields
of an event, `E` model width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Impressions in the jagged layout of OPS.md.

    Args:
        dense: `[B, n_dense]` float; `n_dense` may be 0.
        categorical: `[B, n_cat]` int64 ids.
        sequences: `[T, k]` int64 ids, one row an event, oldest event of an impression first.
        offsets: `[B+1]` int64: the history of impression `b` is `sequences[offsets[b]:offsets[b+1]]`, maybe empty.
        label: `[B]` float, 0 or 1.
        user: `[B]` int64, for gAUC; the model reads users only through `categorical`.
    """

    dense: Tensor
    categorical: Tensor
    sequences: Tensor
    offsets: Tensor
    label: Tensor
    user: Tensor

    def __len__(self) -> int:
        return self.label.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)})


@dataclass(frozen=True)
class Layout:
    """Index maps between behaviour tokens `[T]` and tokens with CLS in front `[T + B*S]`.

    Made on the device, without host synchronisation.

    Args:
        offsets: `[B+1]`: rows of the tokens with their `S` CLS tokens in front.
        source: `[T + B*S]`: where each token comes from in `[all CLS (B*S) | all behaviours (T)]`.
        cls: `[B, S]`: places of the CLS tokens.
        recent: `[B, K]`: places of the last `K` behaviours, oldest first; 0 where the row has fewer.
        has_recent: `[B, K]` bool: whether that place holds a behaviour.
    """

    offsets: Tensor
    source: Tensor
    cls: Tensor
    recent: Tensor
    has_recent: Tensor

    @classmethod
    def of(cls, offsets: Tensor, tokens: int, num_cls: int, num_recent: int) -> Layout:
        """The layout of rows `offsets [B+1]` over `tokens = T` behaviours. Tail tokens stay a tail."""
        rows, device = offsets.shape[0] - 1, offsets.device
        offsets = offsets.long()
        token = torch.arange(tokens, device=device)
        row = row_of_tokens(offsets, tokens)
        with_cls = offsets + num_cls * torch.arange(rows + 1, device=device)
        cls_places = with_cls[:-1, None] + torch.arange(num_cls, device=device)
        source = torch.empty(tokens + rows * num_cls, dtype=torch.int64, device=device)
        source[cls_places.flatten()] = torch.arange(rows * num_cls, device=device)
        source[token + num_cls * (row + 1)] = token + rows * num_cls
        recent = with_cls[1:, None] - num_recent + torch.arange(num_recent, device=device)
        has_recent = recent >= with_cls[:-1, None] + num_cls
        return cls(with_cls, source, cls_places, recent.where(has_recent, 0), has_recent)

    def prepend(self, cls_tokens: Tensor, behaviours: Tensor) -> Tensor:
        """`cls_tokens [B, S, E]` in front of every row of `behaviours [T, E]`: `[T + B*S, E]`."""
        return torch.cat((cls_tokens.flatten(0, 1), behaviours)).index_select(0, self.source)

    def take_cls(self, tokens: Tensor) -> Tensor:
        """The CLS tokens of `tokens [T + B*S, E]`: `[B, S, E]`."""
        return _take(tokens, self.cls)

    def take_recent(self, tokens: Tensor) -> Tensor:
        """The last `K` behaviours of every row, zero where there are fewer: `[B, K, E]`."""
        if not tokens.shape[0]:  # no rows, nothing to index
            return tokens.new_zeros(*self.recent.shape, tokens.shape[1])
        return _take(tokens, self.recent).where(self.has_recent[..., None], 0)


def row_of_tokens(offsets: Tensor, tokens: int) -> Tensor:
    """The row of each of `tokens` tokens, `[T]`; those of a tail count to the last row."""
    token = torch.arange(tokens, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), token, right=True).clamp(max=max(offsets.shape[0] - 2, 0))


def _take(tokens: Tensor, places: Tensor) -> Tensor:
    return tokens.index_select(0, places.flatten()).unflatten(0, places.shape)
