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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interformer_kernels._calls import AttentionCall, FfnCall, RotaryCall, SoftmaxCall, WeightedSumCall
from interformer_kernels.reference_scores import (
    Dropout,
    Masks,
    Sizes,
    places,
    position_bias,
    time_bias,
    visible_keys,
)

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


def mask_rows(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask (on its leading axes) holds, else zero; what is left out is not read and has no gradient."""
    return x.where(mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())), 0)


def similar_rows(*sides: Spans) -> Iterator[Tensor]:
    """Row numbers in groups of similar length on every side, so that padding less than doubles any row.

    At least one group, be it empty, so that outputs always hang on their inputs in the autograd graph.
    """
    powers = 2 ** torch.arange(62, device=sides[0].lengths.device)
    size = sum(torch.bucketize(side.lengths, powers) * 64**i for i, side in enumerate(sides))
    assert isinstance(size, Tensor)
    for group in size.unique() if len(size) else [0]:
        yield (size == group).nonzero().squeeze(1)


def inside_rows(offsets: Tensor, total: int) -> Tensor:
    """Whether each of the `total` tokens belongs to a row, `[T]`; False on the tail."""
    return torch.arange(total, device=offsets.device) < offsets[-1]


def positions_in_rows(offsets: Tensor, total: int) -> Tensor:
    """Index of each token in its own row, int64 `[T]`; meaningless on the tail."""
    token = torch.arange(total, device=offsets.device)
    row = torch.searchsorted(offsets[1:].long().contiguous(), token, right=True)
    return token - offsets.long()[row]


# ---------------------------------------------------------------- attention


class Maps(NamedTuple):
    """The maps from products of queries and keys to weights; all but the softmax have a factor of their sum."""

    scale: float
    score: str
    post_scale: float = 1.0


class Scores(NamedTuple):
    """Softcap, bias, sinks and dropout of the scores of padded rows.

    Attributes:
        softcap: scores become `softcap * tanh(s / softcap)`; 0 leaves them.
        bias: added then; broadcasts to `[B, N, H, L]`.
        sinks: `[H]`, one more score of each query, without a value (softmax).
        dropout: factors of the weights, `[B, N, H, L]`.
    """

    softcap: float = 0.0
    bias: Tensor | None = None
    sinks: Tensor | None = None
    dropout: Tensor | None = None


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, maps: Maps, scores: Scores | None = None
) -> tuple[Tensor, Tensor]:
    """Dense attention of `q [B, N, H, D]` over `k [B, L, Hk, D]`, `v [B, L, Hk, Dv]` where `visible [B, N, L]`.

    Returns `A [B, N, H, Dv]` and `lse [B, N, H]` (float32, or float64 for float64; meaningful for softmax).
    """
    scores = Scores() if scores is None else scores
    group = q.shape[2] // max(k.shape[2], 1)
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    s = maps.scale * torch.einsum("bnhd,blhd->bnhl", q, k)
    visible = visible[:, :, None, :]
    if scores.softcap:  # a hidden score, which may be NaN, has no gradient
        s = scores.softcap * torch.tanh(s.where(visible, 0) / scores.softcap)
    if scores.bias is not None:
        s = s + scores.bias.to(s.dtype)
    dropout = 1 if scores.dropout is None else scores.dropout.to(s.dtype)
    if maps.score != "softmax":
        # Masked before and after: a hidden score has no gradient, whatever it holds.
        a = ACTIVATIONS[maps.score](s.where(visible, 0)).where(visible, 0) * dropout
        return maps.post_scale * torch.einsum("bnhl,blhe->bnhe", a, v), s.new_empty(0)
    # A query that sees no key has scores of 0: their softmax is finite, so no NaN reaches the gradients.
    fully_masked = ~visible.any(-1, keepdim=True)
    s = s.masked_fill(fully_masked, 0).masked_fill(~visible & ~fully_masked, -torch.inf)
    no_key = s.new_full((), -torch.inf) if scores.sinks is None else scores.sinks.to(s.dtype)
    if scores.sinks is not None:
        s = torch.cat((s, no_key[:, None].expand(*s.shape[:-1], 1)), -1)
    p = torch.softmax(s, -1) if s.shape[-1] else s
    p = p[..., : visible.shape[-1]].where(visible, 0) * dropout
    exact = s if s.dtype == torch.float64 else s.float()
    lse = torch.logsumexp(exact, -1)
    return torch.einsum("bnhl,blhe->bnhe", p, v), no_key.to(lse.dtype).where(fully_masked.squeeze(-1), lse)


class Tables(NamedTuple):
    """Tensors that scores of packed rows are made with, and the softcap: fields of `AttentionCall`."""

    softcap: float = 0.0
    sinks: Tensor | None = None
    position_bias: Tensor | None = None
    queries_at_end: bool = False  # for distances, all queries stand behind the last key
    time_bias: Tensor | None = None
    times_q: Tensor | None = None
    times_k: Tensor | None = None
    time_edges: Tensor | None = None
    dropout: Dropout = Dropout(0.0, None)

    def scores(self, index_q: Tensor, index_k: Tensor, p: Tensor, keys: Tensor, heads: int, skipped: int) -> Scores:
        """Those of padded rows whose queries and keys are the tokens `index_q [B, N]` and `index_k [B, L]`."""
        bias: Tensor | None = None
        if self.position_bias is not None:
            at = keys[:, None, None].expand_as(p) if self.queries_at_end else p
            bias = position_bias(self.position_bias, at, index_k.shape[1])
        if self.time_bias is not None:
            times_q, times_k, edges = self.times_q, self.times_k, self.time_edges
            assert times_q is not None
            assert times_k is not None
            assert edges is not None
            by_time = time_bias(self.time_bias, times_q.flatten()[index_q], times_k[index_k], edges)
            bias = by_time if bias is None else bias + by_time
        factors = None
        if self.dropout.p > 0:
            at_key = torch.arange(skipped, skipped + index_k.shape[1], device=index_k.device)
            factors = self.dropout.factors(index_q, at_key, heads)
        return Scores(self.softcap, bias, self.sinks, factors)


NO_TABLES = Tables()


class Rows(NamedTuple):
    """The rows of a call: spans of queries and of keys, keys that each row skips, and targets (None: none)."""

    queries: Spans
    keys: Spans
    skipped: int = 0
    targets: Tensor | None = None


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, maps: Maps, masks: Masks, tables: Tables = NO_TABLES
) -> tuple[Tensor, Tensor]:
    """Row-wise attention of packed `q [Tq, H, D]` over packed `k [Tk, Hk, D]`, `v [Tk, Hk, Dv]`.

    Returns packed `A [Tq, H, Dv]` and `lse [Tq, H]`; query tokens of no row get zero and `-inf`.
    """
    tokens, outputs, sums = [], [], []
    for some in similar_rows(rows.queries, rows.keys):
        here_q, here_k = (Spans(side.starts[some], side.lengths[some]) for side in (rows.queries, rows.keys))
        (index_q, held_q), (index_k, held_k) = token_index(here_q), token_index(here_k)
        sizes = Sizes(here_q.lengths, here_k.lengths, None if rows.targets is None else rows.targets[some])
        size = index_q.shape[1], index_k.shape[1]
        seen = visible_keys(sizes, size, masks)
        row_q, row_k, row_v = (
            mask_rows(q[index_q], held_q),
            mask_rows(k[index_k], held_k),
            mask_rows(v[index_k], held_k),
        )
        scores = tables.scores(index_q, index_k, places(sizes, size).p, sizes.keys, q.shape[1], rows.skipped)
        a, lse = attend(row_q, row_k, row_v, seen, maps, scores)
        tokens.append(index_q[held_q])
        outputs.append(a[held_q])
        if maps.score == "softmax":
            sums.append(lse[held_q])
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = scatter(q.new_zeros(q.shape[0], q.shape[1], v.shape[2]), tokens, outputs)
    if maps.score != "softmax":
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
        gate = gate if inside is None else mask_rows(gate, inside)
        out = out * act(gate) if form == "multiply" else act(out * gate)
    if residual is not None:
        out = residual + out
    return out if inside is None else mask_rows(out, inside)


# ---------------------------------------------------------------- rotary embedding


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first `R` channels of `x [T, H, D]` by the angles of `positions [T]` in the tables `[P, R/2]`.

    Channel pairs are `(c, c + R/2)`, or `(2c, 2c+1)` if interleaved: `(a, b) -> (a cos - b sin, a sin + b cos)`.
    """
    place = positions.long().clamp(0, cos.shape[0] - 1)
    c, s = cos[place][:, None, :], sin[place][:, None, :]
    half = cos.shape[1]
    rotating, passed = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (rotating[..., 0::2], rotating[..., 1::2]) if interleaved else (rotating[..., :half], rotating[..., half:])
    pair = a * c - b * s, a * s + b * c
    joined = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((joined.to(x.dtype), passed), -1)


# ---------------------------------------------------------------- the operations
# Each takes its call (`_calls.py`), and returns what the registered op returns.


def attention(call: AttentionCall, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each row's queries over the row's keys from `skip_prefix` on: `(out, lse, A)`, A before the gate."""
    q, k, offsets = call.q, call.k, call.out_offsets()
    if call.cos is not None and call.sin is not None:
        q = rotate_rows(q, call.cos, call.sin, call.positions_q, offsets, call.rope_interleaved)
        k = rotate_rows(k, call.cos, call.sin, call.positions_k, call.kv_offsets, call.rope_interleaved)
    shape, keys = call.out_shape()[:-1], row_spans(call.kv_offsets, k.shape[0], call.skip_prefix)
    if offsets is None:  # as many queries in every row
        queries = equal_spans(shape[0], shape[1], k.device)
        q = (q.expand(shape[0], *q.shape) if call.layout == "shared" else q).flatten(0, 1)
    else:
        queries = row_spans(offsets, q.shape[0])
    maps = Maps(call.scale, call.score, call.post_scale)
    window = call.window_left, call.window_right
    masks = Masks(call.causal, window, call.num_prefix, call.prefix, call.full_tail)
    rows = Rows(queries, keys, call.skip_prefix, call.num_targets)
    given: dict[str, Any] = {name: getattr(call, name) for name in Tables._fields if name != "dropout"}
    tables = Tables(**given, dropout=Dropout(call.dropout_p, call.dropout_seed))
    attn_out, lse = attend_rows(q, k, k if call.v is None else call.v, rows, maps, masks, tables)
    attn_out = attn_out.view(*shape, attn_out.shape[-1])
    lse = lse.view(shape) if call.score == "softmax" else lse
    inside = None if offsets is None else inside_rows(offsets, q.shape[0])
    return epilogue(attn_out, call.gate, residual, call.gate_form, call.gate_activation, inside), lse, attn_out


def rotate_rows(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offsets: Tensor | None, interleaved: bool
) -> Tensor:
    """`x [T, H, D]` rotated by each token's position, its index in the row where none is given."""
    if positions is None:
        assert offsets is not None  # only packed tokens are rotated
        positions = positions_in_rows(offsets, x.shape[0])
    return rotate(x, cos, sin, positions, interleaved)


def apply_rotary(call: RotaryCall) -> Tensor:
    """`x [T, H, D]` rotated by each token's position; zero on the tail."""
    x, offsets = call.x, call.offsets
    rotated = rotate_rows(x, call.cos, call.sin, call.positions, offsets, call.interleaved)
    return mask_rows(rotated, inside_rows(offsets, x.shape[0]))


def personalized_ffn(call: FfnCall, residual: Tensor | None) -> Tensor:
    """`y_t = act(x_t @ weight_b + bias_b) (+ residual_t)` for every token `t` of row `b`; zero on the tail."""
    x, weight, bias = call.x, call.weight, call.bias
    spans = row_spans(call.offsets, x.shape[0])
    tokens, outputs = [], []
    for rows in similar_rows(spans):
        index, held = token_index(Spans(spans.starts[rows], spans.lengths[rows]))
        y = mask_rows(x[index], held) @ weight[rows]
        # Padding takes no part, whatever the matrix holds.
        y = mask_rows(y if bias is None else y + bias[rows, None], held)
        tokens.append(index[held])
        outputs.append(ACTIVATIONS[call.activation](y)[held])
    out = scatter(x.new_zeros(x.shape[0], weight.shape[2]), tokens, outputs)
    return out if residual is None else mask_rows(residual + out, inside_rows(call.offsets, x.shape[0]))


def jagged_softmax(call: SoftmaxCall) -> Tensor:
    """Softmax of `scores [T, H]` along each row's tokens, head by head; zero for scores of -inf, and on the tail."""
    scores = call.scores
    spans = row_spans(call.offsets, scores.shape[0])
    tokens, outputs = [], []
    for rows in similar_rows(spans):
        index, held = token_index(Spans(spans.starts[rows], spans.lengths[rows]))
        s = mask_rows(scores[index], held)
        visible = held[..., None] & (s != -torch.inf)
        # As in `attend`: where nothing is visible, scores of 0 keep NaN out of the gradients.
        nothing = ~visible.any(1, keepdim=True)
        s = s.masked_fill(nothing, 0).masked_fill(~visible & ~nothing, -torch.inf)
        p = (torch.softmax(s, 1) if s.shape[1] else s).where(visible, 0)
        tokens.append(index[held])
        outputs.append(p[held])
    return scatter(torch.zeros_like(scores), tokens, outputs)


def jagged_weighted_sum(call: WeightedSumCall) -> Tensor:
    """`sum_t weights_th v_th` over the tokens `t` of each row, `[B, H, D]`; zero for empty rows."""
    weights, v = call.weights, call.v
    spans = row_spans(call.offsets, v.shape[0])
    numbers, outputs = [], []
    for rows in similar_rows(spans):
        index, held = token_index(Spans(spans.starts[rows], spans.lengths[rows]))
        numbers.append(rows)
        outputs.append(torch.einsum("blh,blhd->bhd", mask_rows(weights[index], held), mask_rows(v[index], held)))
    return scatter(v.new_zeros(call.out_shape()), numbers, outputs)
