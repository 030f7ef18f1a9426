"""A batch of impressions with jagged histories, and the layout of its tokens with CLS tokens prepended to each row.

Axes: `B` rows (impressions), `R` requests, `T` behaviour tokens of all rows, `S` CLS tokens of a row, `K` recent
tokens, `k` fields of an event, `E` model width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from interformer import checks


@dataclass(frozen=True)
class Batch:
    """Impressions in the jagged layout of docs/ops.md.

    Impressions of one request, its candidates, may share a history: `rows` says which request each of them belongs to.
    What they have in common beside it, the request's fields, each of them repeats.

    Args:
        dense: `[B, n_dense]` float; `n_dense` may be 0.
        categorical: `[B, n_cat]` int64 ids.
        sequences: `[T, k]` int64 ids, one row per event, the oldest event of an impression first.
        offsets: `[B+1]` int64: the history of impression `b` is `sequences[offsets[b]:offsets[b+1]]`; it may be empty.
        label: `[B]` float, 0 or 1.
        user: `[B]` int64, for gAUC; the model sees users only through `categorical`.
        rows: `[B]` int64: the request of each impression, in any order; each request has at least one. Then `offsets`
            is `[R+1]`, and histories are the requests'. None: every impression is a request of its own.
    """

    dense: Tensor
    categorical: Tensor
    sequences: Tensor
    offsets: Tensor
    label: Tensor
    user: Tensor
    rows: Tensor | None = None

    def __len__(self) -> int:
        return self.label.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are given, by name."""
        return {field.name: x for field in fields(self) if (x := getattr(self, field.name)) is not None}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return Batch(**{name: x.to(device, non_blocking=non_blocking) for name, x in self.tensors().items()})

    def unshared(self) -> Batch:
        """The same impressions, each with a history of its own: what models read that know no requests."""
        if self.rows is None:
            return self
        first, length = self.offsets[:-1][self.rows], self.offsets.diff()[self.rows]
        offsets, events = spans(first, length)
        return replace(self, sequences=self.sequences[events], offsets=offsets, rows=None)

    def request_of_each(self) -> Tensor:
        """The request of each impression, `[B]`."""
        return torch.arange(len(self), device=self.label.device) if self.rows is None else self.rows

    def first_impressions(self) -> Tensor:
        """The first impression of each request, `[R]`, which speaks for the fields that they have in common."""
        requests, impressions = self.offsets.shape[0] - 1, torch.arange(len(self), device=self.label.device)
        if self.rows is None:
            return impressions
        first = impressions.new_zeros(requests)
        return first.scatter_reduce(0, self.rows, impressions, "amin", include_self=False)

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
        copy = Batch(**{name: x.clone() for name, x in self.tensors().items()})
        return replace(copy, sequences=torch.nn.functional.pad(copy.sequences, (0, 0, 0, missing)))

    def copy_(self, batch: Batch) -> Batch:
        """Overwrite this batch in place with another of as many rows and at most as many events; returns itself.

        Its events of no row keep the ids that were there. From another device nothing waits for a copy if `batch` lies
        in pinned memory.

        Raises:
            ValueError: `batch` has another number of rows or fields, or more events than fit, or only one of the two
                has requests; nothing was overwritten.
        """
        if (self.rows is None) != (batch.rows is None):
            found = "None" if batch.rows is None else f"shape {list(batch.rows.shape)}"
            raise ValueError(f"batch.rows must be {'None' if self.rows is None else 'given'}, found {found}")
        events = min(batch.sequences.shape[0], self.sequences.shape[0])
        theirs = batch.tensors()
        pairs = {name: (x, theirs[name]) for name, x in self.tensors().items()}
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


def spans(first: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets `[B+1]` of rows of these lengths `[B]`, and the index `[T]` of their tokens, of which row `b` takes those
    from `first[b]` on."""
    offsets = torch.nn.functional.pad(length.cumsum(0), (1, 0))
    row = torch.repeat_interleave(length)
    return offsets, torch.arange(len(row), device=row.device) + (first - offsets[:-1])[row]


def row_of_tokens(offsets: Tensor, tokens: int) -> Tensor:
    """The row of each of `tokens` tokens, `[T]`; tokens of a tail get the last row."""
    token = torch.arange(tokens, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), token, right=True).clamp(max=max(offsets.shape[0] - 2, 0))
