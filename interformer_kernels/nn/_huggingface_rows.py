"""Offsets of packed rows in transformers' layers, given by `cu_seq_lens`, by the mask, or by position ids."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from interformer_kernels import _checks as checks
from interformer_kernels.nn._huggingface_mask import (
    NAME,
    MaskInfo,
    query_positions,
    refuse_gaps_in_a_graph,
    refuse_restarts_with_padding,
    row_starts,
)
from interformer_kernels.nn._rows import equal_offsets

# Offsets `[B+1]` of queries and of keys in a flat batch.
Packed = tuple[Tensor, Tensor]


# `calls`: number of layer calls with `cu_seq_lens` in this thread.
_received = threading.local()


def check_rows_reach_layers(model: nn.Module) -> None:
    """Hook `model` to raise if `cu_seq_lens` given to it do not reach its layers; some models drop such arguments."""
    if "_interformer_rows" not in model.__dict__:
        model.__dict__["_interformer_rows"] = None
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, with_kwargs=True)


def _before(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        has_offsets = kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None
        model.__dict__["_interformer_rows"] = getattr(_received, "calls", 0) if has_offsets else None


def _after(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    if torch.compiler.is_compiling() or getattr(model.config, "_attn_implementation", None) != NAME:
        return
    if model.__dict__["_interformer_rows"] == getattr(_received, "calls", 0):
        raise ValueError(
            f"attn_implementation={NAME!r}: {type(model).__name__} does not pass cu_seq_lens_q and cu_seq_lens_k to "
            "its attention; pass position_ids that restart and no attention_mask, or rows one by one"
        )


def one_row_each(q: Tensor, k: Tensor) -> Packed:
    """Offsets of a batch without packed rows, `q [B, Lq, ...]` over `k [B, Lk, ...]`: each entry is one row."""
    return equal_offsets(q.shape[0], q.shape[1], q.device), equal_offsets(k.shape[0], k.shape[1], k.device)


def from_cu_seq_lens(
    query: Tensor, key: Tensor, cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None
) -> Packed | None:
    """The checked offsets `cu_seq_lens` of `query [B, H, Lq, D]` and of `key [B, Hk, Lk, D]`; None if not given."""
    if cu_seq_lens_q is None and cu_seq_lens_k is None:
        return None
    if not torch.compiler.is_compiling():
        _received.calls = getattr(_received, "calls", 0) + 1
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        missing = "cu_seq_lens_q" if cu_seq_lens_q is None else "cu_seq_lens_k"
        raise ValueError(f"attn_implementation={NAME!r}: {missing} must be given with the other one, found None")
    for name, offsets, x in (("cu_seq_lens_q", cu_seq_lens_q, query), ("cu_seq_lens_k", cu_seq_lens_k, key)):
        place = f"attn_implementation={NAME!r}"
        checks.check_offsets(place, name, offsets, x.device)
        if not torch.compiler.is_compiling():
            checks.check_offsets_content(place, name, offsets, x.shape[0] * x.shape[2])
    return cu_seq_lens_q, cu_seq_lens_k


def combine(info: MaskInfo, packed: Packed | None, query: Tensor) -> Packed | None:
    """Offsets of the rows given by `cu_seq_lens`, by the mask, or by both, also cut where a batch entry ends."""
    row_ids = info.form.rows if info.form is not None else None
    if packed is None and row_ids is None:
        return None
    offsets = []
    if packed is not None:
        if packed[0] is not packed[1] and not torch.equal(*packed):
            raise ValueError(
                f"attn_implementation={NAME!r}: cu_seq_lens_k must be equal to cu_seq_lens_q where there is a mask, "
                f"found {packed[1].shape[0] - 1} rows of keys for {packed[0].shape[0] - 1} of queries, or other lengths"
            )
        offsets.append(packed[0])
        if query.shape[0] > 1:
            offsets.append(equal_offsets(query.shape[0], query.shape[2], query.device))
    if row_ids is not None:
        offsets.append(_offsets(row_ids.diff(dim=1) != 0, query))
    combined = offsets[0] if len(offsets) == 1 else torch.cat(offsets).unique()
    return combined, combined


def _offsets(starts: Tensor, query: Tensor) -> Tensor:
    """Offsets of a flat batch of `query [B, H, L, D]`; a token after the first starts a row where `starts [B, L-1]`."""
    starts = starts.expand(query.shape[0], -1)
    first = torch.ones_like(starts[:, :1]) if starts.shape[1] else starts.new_ones(starts.shape[0], 1)
    begins = torch.cat((first, starts), 1).flatten().nonzero().squeeze(1)
    return torch.cat((begins, begins.new_tensor([query.shape[0] * query.shape[2]])))


def from_position_ids(info: MaskInfo, position_ids: object, query: Tensor, key: Tensor) -> Packed | None:
    """The rows given by position ids, for a mask without rows because the model made it without position ids."""
    positions = query_positions(position_ids, query.shape[0], query.shape[2])
    if positions is None or not isinstance(position_ids, Tensor):
        return None
    if info.offsets is None or info.offsets[0] is not position_ids:
        padding, starts = info.arguments["attention_mask"], None
        if padding is not None:
            refuse_restarts_with_padding(positions, padding, query.shape[2])
        else:
            causal = info.form is None or info.form.causal
            starts = row_starts(positions, causal, query.shape[2] == key.shape[2])
        info.offsets = position_ids, None if starts is None else _offsets(starts, query)
    offsets = info.offsets[1]
    return None if offsets is None else (offsets, offsets)


def without_mask(position_ids: object, causal: bool, query: Tensor, key: Tensor) -> Packed | None:
    """The rows given by position ids when there is no mask at all."""
    positions = query_positions(position_ids, query.shape[0], query.shape[2])
    if positions is None:
        return None
    if torch.compiler.is_compiling():
        if causal:
            refuse_gaps_in_a_graph(positions)
        return None
    starts = row_starts(positions, causal, query.shape[2] == key.shape[2])
    if starts is None:
        return None
    offsets = _offsets(starts, query)
    return offsets, offsets


def mask_other_rows(mask: Tensor, packed: Packed, query: Tensor, key: Tensor) -> Tensor:
    """The mask `[B, 1, Lq, Lk]`, bool or additive, with the keys of other rows masked out too."""
    query_row, key_row = (_row_of_tokens(offsets, x) for offsets, x in zip(packed, (query, key), strict=True))
    same_row = query_row[:, None, :, None] == key_row[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & same_row
    return mask.masked_fill(~same_row, torch.finfo(mask.dtype).min)


def _row_of_tokens(offsets: Tensor, x: Tensor) -> Tensor:
    """The row of each token of `x [B, H, L, D]`, `[B, L]`."""
    tokens = torch.arange(x.shape[0] * x.shape[2], device=x.device, dtype=offsets.dtype)
    return torch.bucketize(tokens, offsets[1:], right=True).view(x.shape[0], x.shape[2])
