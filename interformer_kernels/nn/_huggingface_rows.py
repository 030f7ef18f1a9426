"""Packed rows of transformers' layers: who tells them apart (`cu_seq_lens`, the mask, position ids), and by what."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from interformer_kernels import _checks as checks
from interformer_kernels.nn._huggingface_mask import (
    NAME,
    Pairs,
    positions_of,
    refuse_beside_padding,
    refuse_gaps_in_a_graph,
    starts_anew,
)
from interformer_kernels.nn._rows import equal_offsets

# Offsets `[B+1]` of queries and of keys in a flat batch.
Packed = tuple[Tensor, Tensor]


# How many calls of layers were told packed rows, in this thread.
_told = threading.local()


def follow(model: nn.Module) -> None:
    """See to it that `cu_seq_lens` given to a model reach its layers: some models hand no such arguments on."""
    if "_interformer_rows" not in model.__dict__:
        model.__dict__["_interformer_rows"] = None
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, with_kwargs=True)


def _before(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        given = kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None
        model.__dict__["_interformer_rows"] = getattr(_told, "calls", 0) if given else None


def _after(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    if torch.compiler.is_compiling() or getattr(model.config, "_attn_implementation", None) != NAME:
        return
    if model.__dict__["_interformer_rows"] == getattr(_told, "calls", 0):
        raise ValueError(
            f"attn_implementation={NAME!r}: {type(model).__name__} does not hand cu_seq_lens_q and cu_seq_lens_k to "
            "its attention; pass position_ids that start anew and no attention_mask, or rows one by one"
        )


def one_each(q: Tensor, k: Tensor) -> Packed:
    """One row for each of the batch, `q [B, Lq, ...]` over `k [B, Lk, ...]`."""
    return equal_offsets(q.shape[0], q.shape[1], q.device), equal_offsets(k.shape[0], k.shape[1], k.device)


def told(query: Tensor, key: Tensor, cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None) -> Packed | None:
    """What `cu_seq_lens_q` and `cu_seq_lens_k` say of `query [B, H, Lq, D]` and `key [B, Hk, Lk, D]`."""
    if cu_seq_lens_q is None and cu_seq_lens_k is None:
        return None
    if not torch.compiler.is_compiling():
        _told.calls = getattr(_told, "calls", 0) + 1
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        missing = "cu_seq_lens_q" if cu_seq_lens_q is None else "cu_seq_lens_k"
        raise ValueError(f"attn_implementation={NAME!r}: {missing} must go with the other one of the pair, found None")
    found = []
    for name, offsets, x in (("cu_seq_lens_q", cu_seq_lens_q, query), ("cu_seq_lens_k", cu_seq_lens_k, key)):
        place = f"attn_implementation={NAME!r}"
        checks.check_offsets(place, name, offsets, x.device)
        if not torch.compiler.is_compiling():
            checks.check_offsets_content(place, name, offsets, x.shape[0] * x.shape[2])
        found.append(offsets)
    return found[0], found[1]


def joined(pairs: Pairs, packed: Packed | None, query: Tensor) -> Packed | None:
    """The rows told apart by `cu_seq_lens`, by the mask, or by both; none goes on in the next row of the batch."""
    known = pairs.form.rows if pairs.form is not None else None
    if packed is None and known is None:
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
    if known is not None:
        offsets.append(_offsets(known.diff(dim=1) != 0, query))
    found = offsets[0] if len(offsets) == 1 else torch.cat(offsets).unique()
    return found, found


def _offsets(anew: Tensor, query: Tensor) -> Tensor:
    """Offsets of a flat batch of `query [B, H, L, D]`; tokens behind the first start a row where `anew [B, L-1]`."""
    anew = anew.expand(query.shape[0], -1)
    first = torch.ones_like(anew[:, :1]) if anew.shape[1] else anew.new_ones(anew.shape[0], 1)
    starts = torch.cat((first, anew), 1).flatten().nonzero().squeeze(1)
    return torch.cat((starts, starts.new_tensor([query.shape[0] * query.shape[2]])))


def by_positions(pairs: Pairs, position_ids: object, query: Tensor, key: Tensor) -> Packed | None:
    """The rows that position ids tell apart beside a mask that knows of none: of models that made it without them."""
    positions = positions_of(position_ids, query.shape[0], query.shape[2])
    if positions is None or not isinstance(position_ids, Tensor):
        return None
    if pairs.offsets is None or pairs.offsets[0] is not position_ids:
        padding, anew = pairs.arguments["attention_mask"], None
        if padding is not None:
            refuse_beside_padding(positions, padding, query.shape[2])
        else:
            causal = pairs.form is None or pairs.form.causal
            anew = starts_anew(positions, causal, query.shape[2] == key.shape[2])
        pairs.offsets = position_ids, None if anew is None else _offsets(anew, query)
    offsets = pairs.offsets[1]
    return None if offsets is None else (offsets, offsets)


def without_mask(position_ids: object, causal: bool, query: Tensor, key: Tensor) -> Packed | None:
    """The rows that position ids tell apart where there is no mask at all."""
    positions = positions_of(position_ids, query.shape[0], query.shape[2])
    if positions is None:
        return None
    if torch.compiler.is_compiling():
        if causal:
            refuse_gaps_in_a_graph(positions)
        return None
    anew = starts_anew(positions, causal, query.shape[2] == key.shape[2])
    offsets = None if anew is None else _offsets(anew, query)
    return None if offsets is None else (offsets, offsets)


def hide_others(mask: Tensor, packed: Packed, query: Tensor, key: Tensor) -> Tensor:
    """A mask `[B, 1, Lq, Lk]`, bool or additive, that hides the keys of other rows, too."""
    own, other = (_numbers(offsets, x) for offsets, x in zip(packed, (query, key), strict=True))
    same = own[:, None, :, None] == other[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & same
    return mask.masked_fill(~same, torch.finfo(mask.dtype).min)


def _numbers(offsets: Tensor, x: Tensor) -> Tensor:
    """The row of each token of `x [B, H, L, D]`, `[B, L]`."""
    places = torch.arange(x.shape[0] * x.shape[2], device=x.device, dtype=offsets.dtype)
    return torch.bucketize(places, offsets[1:], right=True).view(x.shape[0], x.shape[2])
