"""The definition of every operation: docs/ops.md in eager PyTorch, read top to bottom.

Rows are padded to a common length, computed densely with a mask, and packed again. Nothing here is fast; everything
else in the package is tested against it. The functions compute in the dtype they are given and are differentiable
as they stand (any number of times), so one page yields the float64 truth, the eager yardstick of a low-precision
kernel, and the `reference` backend.

Axes: `B` rows, `T` packed tokens (`Tq`, `Tk` where queries and keys differ), `N` queries of a row, `L` keys of a row,
`M` seeds, `H` query heads, `Hk` key/value heads, `D` channels of a query/key head, `Dv` of a value head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


# ---------------------------------------------------------------- jagged rows


class Spans(NamedTuple):
    """Where the rows lie on the token axis: row `b` is `[starts[b], starts[b] + lengths[b])`; both int64 `[B]`."""

    starts: Tensor
    lengths: Tensor


def row_spans(offsets: Tensor, total: int, skip: int = 0) -> Spans:
    """Spans of `offsets [B+1]` without each row's first `skip` tokens, clamped to `[0, total]` whatever they hold."""
    edges = offsets.long().clamp(0, total)
    starts = (edges[:-1] + min(skip, total)).clamp(max=total)
    return Spans(starts, (edges[1:] - starts).clamp(min=0))


def equal_spans(rows: int, length: int, device: torch.device) -> Spans:
    """Spans of `rows` rows of one length each: a dense `[B, N]` layout seen as a jagged one."""
    starts = torch.arange(rows, device=device) * length
    return Spans(starts, torch.full_like(starts, length))


def token_index(spans: Spans) -> tuple[Tensor, Tensor]:
    """Token of each padded place, `[B, L]`, and whether the place holds one; `L` is the longest row."""
    steps = torch.arange(int(spans.lengths.max()) if len(spans.lengths) else 0, device=spans.starts.device)
    held = steps < spans.lengths[:, None]
    return (spans.starts[:, None] + steps).where(held, 0), held


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask (on its leading axes) holds, else zero; what is left out is not read and has no gradient."""
    return x.where(mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())), 0)


def similar_rows(*sides: Spans) -> Iterator[Tensor]:
    """Row numbers in groups of similar length on every side, so that padding less than doubles any row.

    At least one group, be it empty, so that outputs always hang on their inputs in the autograd graph.
    """
    powers = 2 ** torch.arange(62, device=sides[0].lengths.device)
    size = sum(torch.bucketize(side.lengths, powers) * 64**i for i, side in enumerate(sides))
    assert isinstance(size, Tensor)
    for one in size.unique() if len(size) else [0]:
        yield (size == one).nonzero().squeeze(1)


def inside_rows(offsets: Tensor, total: int) -> Tensor:
    """Whether each of the `total` tokens belongs to a row, `[T]`; False on the tail."""
    return torch.arange(total, device=offsets.device) < offsets[-1]


def positions_in_rows(offsets: Tensor, total: int) -> Tensor:
    """Index of each token in its own row, int64 `[T]`; meaningless on the tail."""
    token = torch.arange(total, device=offsets.device)
    row = torch.searchsorted(offsets[1:].long().contiguous(), token, right=True)
    return token - offsets.long()[row]


# ---------------------------------------------------------------- attention


def visible_keys(
    queries: Tensor, keys: Tensor, size: tuple[int, int], causal: bool, window: tuple[int, int], num_prefix: int
) -> Tensor:
    """Which key each query sees, `[B, N, L]`, for rows of `queries [B]` queries and `keys [B]` keys.

    Query `i` stands at `p = i + (keys - queries)`, so that the last query stands at the last key.
    """
    device = queries.device
    i = torch.arange(size[0], device=device)[:, None]
    j = torch.arange(size[1], device=device)
    p = i + (keys - queries)[:, None, None]
    left, right = window
    seen = torch.ones_like(p + j, dtype=torch.bool)
    if causal:
        seen &= j <= p
    if left >= 0:
        seen &= j >= p - left
    if right >= 0:
        seen &= j <= p + right
    seen |= (j < num_prefix) | (i < num_prefix)
    return seen & (i < queries[:, None, None]) & (j < keys[:, None, None])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    score: str,
    post_scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Dense attention of `q [B, N, H, D]` over `k [B, L, Hk, D]`, `v [B, L, Hk, Dv]` where `visible [B, N, L]`.

    Returns `A [B, N, H, Dv]` and `lse [B, N, H]` (float32, or float64 for float64; meaningful for softmax). Each weight
    is left out with probability `dropout`, and the others grow by `1 / (1 - dropout)`: no op offers it, modules in
    training use it.
    """
    group = q.shape[2] // max(k.shape[2], 1)
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    s = scale * torch.einsum("bnhd,blhd->bnhl", q, k)
    visible = visible[:, :, None, :]
    if score != "softmax":
        # Masked before and after: what is not seen has no gradient, whatever it holds.
        a = F.dropout(ACTIVATIONS[score](s.where(visible, 0)).where(visible, 0), dropout)
        return post_scale * torch.einsum("bnhl,blhe->bnhe", a, v), s.new_empty(0)
    # A query that sees no key has scores of 0: their softmax is finite, so no NaN reaches the gradients.
    blind = ~visible.any(-1, keepdim=True)
    s = s.masked_fill(blind, 0).masked_fill(~visible & ~blind, -torch.inf)
    p = F.dropout((torch.softmax(s, -1) if s.shape[-1] else s).where(visible, 0), dropout)
    exact = s.detach() if s.dtype == torch.float64 else s.detach().float()
    lse = torch.logsumexp(exact.masked_fill(blind, -torch.inf), -1)
    return torch.einsum("bnhl,blhe->bnhe", p, v), lse


def attend_rows(
    q: Tensor,
    q_spans: Spans,
    k: Tensor,
    v: Tensor,
    k_spans: Spans,
    scale: float,
    score: str,
    post_scale: float,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    num_prefix: int = 0,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Row-wise attention of packed `q [Tq, H, D]` over packed `k [Tk, Hk, D]`, `v [Tk, Hk, Dv]`.

    Returns packed `A [Tq, H, Dv]` and `lse [Tq, H]`; query tokens of no row get zero and `-inf`.
    """
    tokens, outputs, sums = [], [], []
    for rows in similar_rows(q_spans, k_spans):
        here_q, here_k = (Spans(side.starts[rows], side.lengths[rows]) for side in (q_spans, k_spans))
        (index_q, held_q), (index_k, held_k) = token_index(here_q), token_index(here_k)
        size = index_q.shape[1], index_k.shape[1]
        seen = visible_keys(here_q.lengths, here_k.lengths, size, causal, window, num_prefix)
        row_q, row_k, row_v = keep(q[index_q], held_q), keep(k[index_k], held_k), keep(v[index_k], held_k)
        a, lse = attend(row_q, row_k, row_v, seen, scale, score, post_scale, dropout)
        tokens.append(index_q[held_q])
        outputs.append(a[held_q])
        if score == "softmax":
            sums.append(lse[held_q])
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = scatter(q.new_zeros(q.shape[0], q.shape[1], v.shape[2]), tokens, outputs)
    if score != "softmax":
        return out, q.new_empty(0, dtype=exact)
    return out, scatter(q.new_full(q.shape[:2], -torch.inf, dtype=exact), tokens, sums)


def scatter(base: Tensor, tokens: list[Tensor], values: list[Tensor]) -> Tensor:
    """`base [T, ...]` with the packed pieces written at their tokens."""
    return base.index_put((torch.cat(tokens),), torch.cat(values))


def epilogue(
    attn_out: Tensor, gate: Tensor | None, residual: Tensor | None, form: str, activation: str, inside: Tensor | None
) -> Tensor:
    """`residual + G(A, gate)`, zero outside the rows (`inside` marks the tokens of rows; None where all are)."""
    out, act = attn_out, ACTIVATIONS[activation]
    if gate is not None:
        gate = gate.expand_as(attn_out)
        gate = gate if inside is None else keep(gate, inside)
        out = out * act(gate) if form == "multiply" else act(out * gate)
    if residual is not None:
        out = residual + out
    return out if inside is None else keep(out, inside)


# ---------------------------------------------------------------- rotary embedding


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first `R` channels of `x [T, H, D]` by the angles of `positions [T]` in the tables `[P, R/2]`.

    Channel pairs are `(c, c + R/2)`, or `(2c, 2c+1)` if interleaved: `(a, b) -> (a cos - b sin, a sin + b cos)`.
    """
    place = positions.long().clamp(0, cos.shape[0] - 1)
    c, s = cos[place][:, None, :], sin[place][:, None, :]
    half = cos.shape[1]
    turned, passed = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = a * c - b * s, a * s + b * c
    joined = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((joined.to(x.dtype), passed), -1)


# ---------------------------------------------------------------- the operations
# Each returns what its registered op returns: `(out, lse, attn_out)` for attention, where `attn_out` is the ungated A.


def jagged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    kv_offsets: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions_q: Tensor | None,
    positions_k: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    num_prefix: int,
    rope_interleaved: bool,
    score: str,
    post_scale: float,
    gate_form: str,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the tokens of each row over the tokens of the same row (or of the same row of another sequence)."""
    key_offsets = offsets if kv_offsets is None else kv_offsets
    if cos is not None and sin is not None:
        at_q = positions_in_rows(offsets, q.shape[0]) if positions_q is None else positions_q
        at_k = positions_in_rows(key_offsets, k.shape[0]) if positions_k is None else positions_k
        q, k = rotate(q, cos, sin, at_q, rope_interleaved), rotate(k, cos, sin, at_k, rope_interleaved)
    spans_q, spans_k = row_spans(offsets, q.shape[0]), row_spans(key_offsets, k.shape[0])
    masks = causal, (window_left, window_right), num_prefix
    attn_out, lse = attend_rows(q, spans_q, k, v, spans_k, scale, score, post_scale, *masks)
    out = epilogue(attn_out, gate, residual, gate_form, gate_activation, inside_rows(offsets, q.shape[0]))
    return out, lse, attn_out


def gated_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_offsets: Tensor,
    q_offsets: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    scale: float,
    score: str,
    post_scale: float,
    gate_form: str,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each row's queries, dense `[B, N, H, D]` or jagged `[Tq, H, D]`, over all keys of the row."""
    spans_k = row_spans(kv_offsets, k.shape[0])
    if q_offsets is not None:
        spans_q, inside = row_spans(q_offsets, q.shape[0]), inside_rows(q_offsets, q.shape[0])
        attn_out, lse = attend_rows(q, spans_q, k, v, spans_k, scale, score, post_scale)
        return epilogue(attn_out, gate, residual, gate_form, gate_activation, inside), lse, attn_out
    rows, queries = q.shape[:2]
    spans_q = equal_spans(rows, queries, q.device)
    packed, lse = attend_rows(q.flatten(0, 1), spans_q, k, v, spans_k, scale, score, post_scale)
    attn_out = packed.unflatten(0, (rows, queries))
    lse = lse.unflatten(0, (rows, queries)) if score == "softmax" else lse
    return epilogue(attn_out, gate, residual, gate_form, gate_activation, None), lse, attn_out


def pma_pooling(
    seeds: Tensor,
    k: Tensor,
    v: Tensor | None,
    offsets: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    scale: float,
    skip_prefix: int,
    score: str,
    post_scale: float,
    gate_form: str,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the seeds `[M, H, D]`, the same for every row, over the row's keys from `skip_prefix` on."""
    rows, num_seeds = offsets.shape[0] - 1, seeds.shape[0]
    spans_q, spans_k = equal_spans(rows, num_seeds, k.device), row_spans(offsets, k.shape[0], skip_prefix)
    q = seeds.expand(rows, *seeds.shape).flatten(0, 1)
    packed, lse = attend_rows(q, spans_q, k, k if v is None else v, spans_k, scale, score, post_scale)
    attn_out = packed.unflatten(0, (rows, num_seeds))
    lse = lse.unflatten(0, (rows, num_seeds)) if score == "softmax" else lse
    return epilogue(attn_out, gate, residual, gate_form, gate_activation, None), lse, attn_out


def apply_rotary(
    x: Tensor, offsets: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    """`x [T, H, D]` rotated by each token's position (its index in the row where none is given); zero on the tail."""
    at = positions_in_rows(offsets, x.shape[0]) if positions is None else positions
    return keep(rotate(x, cos, sin, at, interleaved), inside_rows(offsets, x.shape[0]))


def personalized_ffn(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """`y_t = act(x_t @ weight_b + bias_b) (+ residual_t)` for every token `t` of row `b`; zero on the tail."""
    spans = row_spans(offsets, x.shape[0])
    tokens, outputs = [], []
    for rows in similar_rows(spans):
        index, held = token_index(Spans(spans.starts[rows], spans.lengths[rows]))
        y = keep(x[index], held) @ weight[rows]
        # Padding takes no part, whatever the matrix holds.
        y = keep(y if bias is None else y + bias[rows, None], held)
        tokens.append(index[held])
        outputs.append(ACTIVATIONS[activation](y)[held])
    out = scatter(x.new_zeros(x.shape[0], weight.shape[2]), tokens, outputs)
    return out if residual is None else keep(residual + out, inside_rows(offsets, x.shape[0]))
