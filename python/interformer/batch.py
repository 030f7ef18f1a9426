"""A batch of impressions with jagged histories, and the layout of its tokens with CLS tokens prepended to each row.

Axes: `B` rows (impressions), `T` behaviour tokens of all rows, `S` CLS tokens of a row, `K` recent tokens, `k` fields
of an event, `E` model width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from interformer import checks


@dataclass(frozen=True)
class Batch:
    """Impressions in the jagged layout of docs/ops.md.

    Args:
        dense: `[B, n_dense]` float; `n_dense` may be 0.
        categorical: `[B, n_cat]` int64 ids.
        sequences: `[T, k]` int64 ids, one row per event, the oldest event of an impression first.
        offsets: `[B+1]` int64: the history of impression `b` is `sequences[offsets[b]:offsets[b+1]]`; it may be empty.
        label: `[B]` float, 0 or 1.
        user: `[B]` int64, for gAUC; the model sees users only through `categorical`.
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

    def with_capacity(self, tokens: int) -> Batch:
        """A copy with place for `tokens` events, at least `T`: events of no row, behind the last one, have id 0.

        Such events cost time, but change neither logits nor gradients. So batches of different lengths can share one
        shape, and with `copy_` one place in memory, as a captured CUDA graph needs (docs/recipes/cuda_graphs.md).

        Raises:
            ValueError: the batch has more than `tokens` events.
        """
        checks.whole("tokens", tokens, 0)
        missing = tokens - self.sequences.shape[0]
        if missing < 0:
            raise ValueError(f"tokens must be at least the batch's {self.sequences.shape[0]} events, found {tokens}")
        copy = Batch(**{field.name: getattr(self, field.name).clone() for field in fields(self)})
        return replace(copy, sequences=torch.nn.functional.pad(copy.sequences, (0, 0, 0, missing)))

    def copy_(self, batch: Batch) -> Batch:
        """Overwrite this batch in place with another of as many rows and at most as many events; returns itself.

        Its events of no row keep the ids that were there. From another device nothing waits for a copy if `batch` lies
        in pinned memory.

        Raises:
            ValueError: `batch` has another number of rows or fields, or more events than fit; nothing was overwritten.
        """
        events = min(batch.sequences.shape[0], self.sequences.shape[0])
        pairs = {field.name: (getattr(self, field.name), getattr(batch, field.name)) for field in fields(self)}
        pairs["sequences"] = self.sequences[:events], batch.sequences
        for name, (target, source) in pairs.items():
            if target.shape != source.shape:
                most = f"at most {self.sequences.shape[0]} events, " if name == "sequences" else ""
                raise ValueError(f"batch.{name} must have {most}shape {list(target.shape)}, found {list(source.shape)}")
        for target, source in pairs.values():
            target.copy_(source, non_blocking=True)
        return self


@dataclass(frozen=True)
class Layout:
    """Index maps between behaviour tokens `[T]` and tokens with prepended CLS tokens `[T + B*S]`.

    They are computed on the device, without host synchronisation.

    Args:
        offsets: `[B+1]`: offsets of the rows with their `S` prepended CLS tokens.
        cls: `[B, S]`: indices of the CLS tokens.
        events: `[T]`: indices of the behaviours.
        summary: `[B, S+K]`: indices of the CLS tokens and of the last `K` behaviours, oldest first; 0 for missing ones.
        valid: `[B, S+K]` bool: False for missing behaviours.
    """

    offsets: Tensor
    cls: Tensor
    events: Tensor
    summary: Tensor
    valid: Tensor

    @classmethod
    def from_offsets(cls, offsets: Tensor, tokens: int, num_cls: int, num_recent: int) -> Layout:
        """The layout of rows `offsets [B+1]` over `tokens = T` behaviours. A tail stays a tail."""
        rows, device = offsets.shape[0] - 1, offsets.device
        offsets = offsets.long()
        with_cls = offsets + num_cls * torch.arange(rows + 1, device=device)
        first, end = with_cls[:-1, None], with_cls[1:, None]
        cls_index = first + torch.arange(num_cls, device=device)
        events = torch.arange(tokens, device=device) + num_cls * (row_of_tokens(offsets, tokens) + 1).clamp(max=rows)
        recent = end - num_recent + torch.arange(num_recent, device=device)
        summary = torch.cat((cls_index, recent), 1)
        valid = torch.cat((torch.ones_like(cls_index, dtype=torch.bool), recent >= first + num_cls), 1)
        return cls(with_cls, cls_index, events, summary.where(valid, 0), valid)

    def prepend(self, cls_tokens: Tensor, behaviours: Tensor) -> Tensor:
        """`cls_tokens [B, S, E]` prepended to the rows of `behaviours [T, E]`: `[T + B*S, E]`."""
        tokens = behaviours.new_empty(self.cls.numel() + behaviours.shape[0], behaviours.shape[1])
        cls_tokens = cls_tokens.to(tokens.dtype).flatten(0, 1)
        return tokens.index_copy_(0, self.events, behaviours).index_copy_(0, self.cls.flatten(), cls_tokens)

    def take_cls(self, tokens: Tensor) -> Tensor:
        """The CLS tokens of `tokens [T + B*S, E]`: `[B, S, E]`."""
        return tokens.index_select(0, self.cls.flatten()).unflatten(0, self.cls.shape)

    def take_summary(self, tokens: Tensor) -> Tensor:
        """CLS tokens and the last `K` behaviours of every row, zero for missing ones: `[B, S+K, E]`."""
        if torch.compiler.is_exporting():  # The program serves all sizes, so index 0 must exist even without tokens.
            tokens = tokens if self.cls.shape[1] else torch.nn.functional.pad(tokens, (0, 0, 0, 1))
        elif not tokens.shape[0]:  # Without tokens, index 0 does not exist.
            return tokens.new_zeros(*self.summary.shape, tokens.shape[1])
        summary_tokens = tokens.index_select(0, self.summary.flatten()).unflatten(0, self.summary.shape)
        return summary_tokens.where(self.valid[..., None], 0)


def row_of_tokens(offsets: Tensor, tokens: int) -> Tensor:
    """The row of each of `tokens` tokens, `[T]`; tokens of a tail get the last row."""
    token = torch.arange(tokens, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), token, right=True).clamp(max=max(offsets.shape[0] - 2, 0))
