"""Packed rows of transformers' layers: who tells them apart (`cu_seq_lens`, the mask, position ids), and by what."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels.nn._huggingface_mask import NAME, Pairs
from interformer_kernels.nn._rows import equal_offsets

# Offsets `[B+1]` of queries and of keys in a flat batch.
Packed = tuple[Tensor, Tensor]
_AMBIGUOUS = "must rise by 1 where they do not start packed rows anew"


def one_each(q: Tensor, k: Tensor) -> Packed:
    """One row for each of the batch, `q [B, Lq, ...]` over `k [B, Lk, ...]`."""
    return equal_offsets(q.shape[0], q.shape[1], q.device), equal_offsets(k.shape[0], k.shape[1], k.device)


def told(query: Tensor, key: Tensor, cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None) -> Packed | None:
    """What `cu_seq_lens_q` and `cu_seq_lens_k` say of `query [B, H, Lq, D]` and `key [B, Hk, Lk, D]`."""
    if cu_seq_lens_q is None and cu_seq_lens_k is None:
        return None
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
    """The rows that are told apart by `cu_seq_lens`, by the mask, or by both; no row goes on in the next of the batch."""
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
    """Offsets of a flat batch of `query [B, H, L, D]` whose tokens behind the first start a row where `anew [B, L-1]`."""
    anew = anew.expand(query.shape[0], -1)
    first = torch.ones_like(anew[:, :1]) if anew.shape[1] else anew.new_ones(anew.shape[0], 1)
    starts = torch.cat((first, anew), 1).flatten().nonzero().squeeze(1)
    return torch.cat((starts, starts.new_tensor([query.shape[0] * query.shape[2]])))


def by_positions(pairs: Pairs, position_ids: object, query: Tensor, key: Tensor) -> Packed | None:
    """The rows that position ids tell apart beside a mask that knows of none.

    Transformers looks at them only where there is neither a cache nor an `attention_mask`; so, with the cache that models
    make by default, its own implementations let packed rows see one another.
    """
    positions = _positions(position_ids, query)
    if positions is None:
        return None
    if pairs.offsets is None or pairs.offsets[0] is not position_ids:
        causal = pairs.form is None or pairs.form.causal
        padding = pairs.arguments["attention_mask"]
        assert isinstance(position_ids, Tensor)
        if padding is not None:
            _refuse_beside_padding(positions, padding, query.shape[2])
            found = None
        else:
            found = _separate(positions, causal, query, key)
        pairs.offsets = position_ids, found
    offsets = pairs.offsets[1]
    return None if offsets is None else (offsets, offsets)


def without_mask(position_ids: object, causal: bool, query: Tensor, key: Tensor) -> Packed | None:
    """The rows that position ids tell apart where there is no mask at all."""
    positions = _positions(position_ids, query)
    if positions is None or not isinstance(position_ids, Tensor):
        return None
    if torch.compiler.is_compiling():
        if causal:
            torch._assert_async((positions.diff(dim=1) == 1).all(), f"position_ids {_AMBIGUOUS}, under torch.compile")
        return None
    offsets = _separate(positions, causal, query, key)
    return None if offsets is None else (offsets, offsets)


def _positions(position_ids: object, query: Tensor) -> Optional[Tensor]:
    """Position ids `[B or 1, L]` of the queries, more than one; None where there are none."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or query.shape[2] < 2:
        return None
    fits = position_ids.shape[1] == query.shape[2] and position_ids.shape[0] in (1, query.shape[0])
    return position_ids if fits else None


def _separate(positions: Tensor, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    steps = positions.diff(dim=1)
    if bool((steps == 1).all()):
        return None
    place = f"attn_implementation={NAME!r}: position_ids"
    if not causal:
        # Of bidirectional attention positions say nothing, unless they look just like those of packed rows.
        if bool(((steps == 1) | (positions[:, 1:] == 0)).all()) and bool((positions[:, 0] == 0).all()):
            raise ValueError(f"{place} start anew in bidirectional attention; tell packed rows by cu_seq_lens_q and _k")
        return None
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"{place} {_AMBIGUOUS}: queries behind a filled cache must be of one row, found several")
    if bool((steps > 0).all()):
        raise ValueError(f"{place} {_AMBIGUOUS}, found a gap; pass an attention_mask if all tokens are of one row")
    return _offsets(steps != 1, query)


def _refuse_beside_padding(positions: Tensor, padding: Tensor, queries: int) -> None:
    """Flash attention would take these rows for packed, `sdpa` for one: neither is known to be meant."""
    tokens = padding[:, -queries:].bool()
    anew = (positions[:, 1:] == 0) & (positions.diff(dim=1) != 1)
    if tokens.shape[1] == queries and bool((anew & tokens[:, 1:] & tokens[:, :-1]).any()):
        raise ValueError(
            f"attn_implementation={NAME!r}: position_ids start anew beside an attention_mask; pass packed rows without "
            "attention_mask, or with cu_seq_lens_q and cu_seq_lens_k"
        )


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
