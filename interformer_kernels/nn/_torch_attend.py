"""Attention with the parameters of `torch.nn.MultiheadAttention`, under a mask whose form is known."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interformer_kernels.jagged import layout_of_mask
from interformer_kernels.nn import _attention as shared
from interformer_kernels.nn._mask_forms import BandMask, bounds, seeing_queries
from interformer_kernels.nn._rows import equal_offsets
from interformer_kernels.ops.gated_cross_attention import gated_cross_attention
from interformer_kernels.ops.jagged_attention import jagged_attention


def attend(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, form: BandMask) -> Tensor:
    """The output of `MultiheadAttention` for `query [B, N, E]` over `key`, `value [B, L, ...]`: `[B, N, E]`.

    `form` is one of `with_padding`. Queries at padding get outputs too, as in PyTorch; those that see no key get zeros
    from the attention.
    """
    reach = _reach(form, key.shape[1] - query.shape[1])
    if not query.numel():
        form, reach = BandMask(), {}
    if form.keys is None and reach is not None:
        attn_out = _attend_all_keys(attention, query, key, value, reach)
    elif form.has_band:
        attn_out = _attend_band(attention, query, key, value, form)
    else:
        assert form.keys is not None
        attn_out = _attend_packed_keys(attention, query, key, value, form.keys)
    if form.queries is not None:
        attn_out = attn_out.where(form.queries[..., None, None], 0)
    return shared.project_out(attention, attn_out)


def _reach(form: BandMask, shift: int) -> dict[str, Any] | None:
    """The masks of `jagged_attention` for rows whose last query, moved by `shift`, stands at the last key.

    None if the farthest or the nearest key of a query would lie on the wrong side of its place.
    """
    left = -1 if form.lower is None else shift - form.lower
    right = -1 if form.upper is None else form.upper - shift
    if (form.lower is not None and left < 0) or (form.upper is not None and right < 0):
        return None
    return {"causal": right == 0, "window": (left, -1 if right == 0 else right)}


def _attend_all_keys(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, reach: dict[str, Any]
) -> Tensor:
    """All queries `[B, N, E]` over all keys: `[B, N, H, D]`."""
    rows, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    flat = key.flatten(0, 1)
    if query is key and key is value:
        q, k, v = shared.project_self(attention, flat)
    else:
        q = shared.project_query(attention, query.flatten(0, 1))
        k, v = shared.project_keys(attention, flat, flat if value is key else value.flatten(0, 1))
    q_offsets, kv_offsets = equal_offsets(rows, queries, query.device), equal_offsets(rows, keys, query.device)
    drops = shared.dropout_of(attention, query.device)
    attn_out = shared.output_only(jagged_attention(q, k, v, q_offsets, kv_offsets=kv_offsets, **reach, **drops))
    return attn_out.view(rows, queries, *attn_out.shape[1:])


def _attend_packed_keys(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, tokens: Tensor
) -> Tensor:
    """All queries `[B, N, E]` over the keys where `tokens [B, L]`: `[B, N, H, D]`."""
    layout = layout_of_mask(tokens)
    packed = layout.pack(key)
    k, v = shared.project_keys(attention, packed, packed if value is key else layout.pack(value))
    q, drops = shared.project_query(attention, query), shared.dropout_of(attention, query.device)
    return shared.output_only(gated_cross_attention(q, k, v, layout.offsets, **drops))


def _attend_band(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, form: BandMask) -> Tensor:
    """All queries `[B, N, E]` over the keys of a band: `[B, N, H, D]`, zeros for queries that see none."""
    tokens = key.new_ones(key.shape[:2], dtype=torch.bool) if form.keys is None else form.keys
    inside, later, reach = _query_spans(form, tokens, query.shape[1])
    extra = inside.shape[1] - query.shape[1]
    drops, layout = shared.dropout_of(attention, query.device), layout_of_mask(tokens)
    packed = layout.pack(key)
    if query is key and key is value and not extra and torch.equal(inside, tokens):
        at_queries = layout
        q, k, v = shared.project_self(attention, packed)
    else:
        k, v = shared.project_keys(attention, packed, packed if value is key else layout.pack(value))
        at_queries = layout_of_mask(inside)
        q = shared.project_query(attention, at_queries.pack(F.pad(query, (0, 0, 0, extra)) if extra else query))
        reach["kv_offsets"] = layout.offsets
    out = shared.output_only(jagged_attention(q, k, v, at_queries.offsets, **reach, **drops))
    attn_out = at_queries.pad(out)[:, : query.shape[1]]
    if later is None:
        return attn_out
    at_later = layout_of_mask(later)
    drops = shared.dropout_of(attention, query.device)
    q = shared.project_query(attention, at_later.pack(query))
    out = shared.output_only(gated_cross_attention(q, k, v, layout.offsets, q_offsets=at_later.offsets, **drops))
    return attn_out + at_later.pad(out)


def _query_spans(form: BandMask, tokens: Tensor, length: int) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """The queries `[B, N or more]` of the rows of `jagged_attention`, the later ones `[B, N]`, and the op's masks.

    A row of the op has queries up to the one that stands at the last of its keys, `shift` keys away from it in the
    padded batch. Without a lower bound, later queries see all tokens of the row, as in cross attention. With one, there
    are none: `shift` is chosen such that no later query sees a key. Rows may then end behind the batch's last query.
    """
    seeing = seeing_queries(form, tokens.shape[0], length, tokens.device)
    first, last = bounds(seeing)
    ends, some = bounds(tokens)[1] + 1, seeing.any(1)
    if form.lower is None:
        assert form.upper is not None
        shift = form.upper
    else:
        nearest = int((ends - last - 1).where(some, length + tokens.shape[1]).min())
        shift = nearest if form.upper is None else min(form.upper, nearest)
    stops = (ends - shift).where(some, 0)
    width = length if form.lower is None else max(length, int(stops.max()))
    index = torch.arange(width, device=tokens.device)
    inside = (index >= first[:, None]) & (index < stops[:, None])
    reach = _reach(form, shift)
    assert reach is not None
    return inside, seeing & (index >= stops[:, None]) if form.lower is None else None, reach
