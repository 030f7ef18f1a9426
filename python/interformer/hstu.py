"""A baseline like HSTU (Zhai et al., 2024), on the same features, widths and jagged batches as the other models.

Axes: `B` impressions, `R` requests, `T` events, `E` width, `H` heads of `D = E / H`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from interformer.batch import Batch
from interformer.config import InterFormerConfig
from interformer.embedding import Embedding
from interformer.layers import MLP
from interformer.schema import Schema
from interformer_kernels import jagged_attention
from interformer_kernels.nn import RelativePositionBias
from interformer_kernels.ops.slices import unbind_slices


class HSTU(nn.Module):
    """Like HSTU's ranking model: a request's history and its candidates are one row of tokens, computed once.

    Candidates are the last tokens of the row. Each sees the whole history and itself, and none of the others, so its
    logit is that of a request with this candidate alone. An event is `lce` of its fields, a candidate a linear map of
    its; the head reads the candidate's output beside the non-sequence tokens. Differences from the paper: events and
    actions are not interleaved, and time enters by the events' fields instead of a bias by differences of times.
    """

    def __init__(self, config: InterFormerConfig, schema: Schema) -> None:
        super().__init__()
        if not schema.candidate:
            raise ValueError("HSTU: schema.candidate must name the candidate's fields, found none")
        width = config.embed_dim
        self.embedding = Embedding(config, schema)
        self.lce = nn.Linear(len(self.embedding.columns) * width, width)
        self.candidate = nn.Linear(len(schema.candidate) * width, width)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.head = MLP(((schema.num_tokens + 1) * width, *config.head_hidden, 1), config.dropout)

    def forward(self, batch: Batch) -> Tensor:
        """Logits `[B]`."""
        x = self.embedding.tokens(batch)  # [B, n, E]
        events = self.lce(self.embedding.events(batch))  # [T, E]
        candidates = self.candidate(self.embedding.candidate_of(x))  # [B, E]
        rows = _Rows.of(batch)
        tokens = events.new_empty(len(events) + len(candidates), events.shape[1])
        tokens = tokens.index_copy(0, rows.events, events).index_copy(0, rows.candidates, candidates)
        for layer in self.layers:
            tokens = layer(tokens, rows.offsets, rows.num_candidates)
        return self.head(torch.cat((x.flatten(1), tokens.index_select(0, rows.candidates)), 1)).squeeze(1)


class _Rows(NamedTuple):
    """Rows of a request's events and, behind them, its candidates; events of no row stay behind all rows.

    Attributes:
        offsets: `[R+1]`.
        num_candidates: `[R]`.
        events, candidates: the index of each event `[T]` and of each impression's candidate `[B]` among the tokens.
    """

    offsets: Tensor
    num_candidates: Tensor
    events: Tensor
    candidates: Tensor

    @classmethod
    def of(cls, batch: Batch) -> _Rows:
        request, offsets = batch.request_of_each(), batch.offsets.long()
        counts = torch.bincount(request, minlength=len(offsets) - 1)
        before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))  # candidates of earlier requests, [R+1]
        event = torch.arange(len(batch.sequences), device=offsets.device)
        row = torch.searchsorted(offsets[1:], event, right=True)  # R for events of no row
        order = torch.argsort(request, stable=True)
        # Sorted by request, candidate i follows the i candidates before it and all events up to its request's last.
        sorted_places = torch.arange(len(order), device=order.device) + offsets[1:][request[order]]
        places = torch.empty_like(order).scatter_(0, order, sorted_places)
        return cls(offsets + before, counts, event + before[row], places)


class _Layer(nn.Module):
    """`x + W_o (norm(A) * U)`, with `U, V, Q, K = silu(W norm(x))` and pointwise attention `A` with a position bias."""

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads, self.longest, self.backend = config.num_heads, config.max_history + 1, config.backend
        self.norm, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.uvqk, self.out = nn.Linear(width, 4 * width), nn.Linear(width, width)
        self.position = RelativePositionBias(config.num_heads, self.longest, bidirectional=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, offsets: Tensor, num_targets: Tensor) -> Tensor:
        projected = nn.functional.silu(self.uvqk(self.norm(tokens)))
        u, rest = projected.tensor_split((tokens.shape[1],), 1)
        v, q, k = unbind_slices(rest.unflatten(1, (3, self.num_heads, -1)))
        a = jagged_attention(
            q, k, v, offsets, causal=True, num_targets=num_targets, score="silu", post_scale=1 / self.longest,
            position_bias=self.position().to(tokens.dtype), backend=self.backend,
        )  # fmt: skip
        assert isinstance(a, Tensor)
        return tokens + self.dropout(self.out(self.norm_out(a.flatten(1)) * u))
