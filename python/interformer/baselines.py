"""Baselines for InterFormer, on the same features, widths and jagged batches.

Each is `Batch -> logits [B]`, made from `InterFormerConfig` (it ignores settings that do not apply) and a `Schema`.
Padding, truncation and one-hot encoding of the papers are replaced by the jagged form; a model that differs in more is
called "-like".
Axes: `B` rows, `R` requests, `T` events, `n` non-sequence tokens, `E` width, `H` heads of `D = E / H`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from interformer.batch import Batch, Layout, row_of_tokens
from interformer.config import InterFormerConfig
from interformer.cross import pool_mean
from interformer.embedding import Embedding, module_key
from interformer.layers import MLP, RotaryTables
from interformer.schema import Schema
from interformer.sequence import SelfAttention
from interformer_kernels import jagged_attention, jagged_weighted_sum
from interformer_kernels.nn import RelativePositionBias
from interformer_kernels.ops.slices import unbind_slices


class LogisticRegression(nn.Module):
    """One weight for every id of the categorical fields and every dense scalar; no history, no feature interactions."""

    def __init__(self, config: InterFormerConfig, schema: Schema) -> None:
        super().__init__()
        self.schema = schema
        self.weights = nn.ModuleDict()
        self.key_of = {field.table: module_key(field.table) for field in schema.categorical}
        for field in schema.categorical:
            key = self.key_of[field.table]
            if key not in self.weights:
                self.weights[key] = table = nn.Embedding(schema.tables[field.table], 1)
                nn.init.zeros_(table.weight)
        self.dense = nn.Linear(len(schema.dense), 1)

    def forward(self, batch: Batch) -> Tensor:
        batch = batch.unshared()
        logits = self.dense(batch.dense)
        for i, field in enumerate(self.schema.categorical):
            logits = logits + self.weights[self.key_of[field.table]](batch.categorical[:, i])
        return logits.squeeze(1)


class WithEvents(nn.Module, ABC):
    """Base of the deep baselines: tokens `X`, events `e_t = lce(Sc_t) [T, E]`, a head over `X` and pooled events."""

    reads_requests: ClassVar[bool] = False  # whether `pool` reads the history that a request's candidates share

    def __init__(self, config: InterFormerConfig, schema: Schema, num_pooled: int) -> None:
        super().__init__()
        self.config, self.schema = config, schema
        width = config.embed_dim
        self.embedding = Embedding(config, schema)
        self.lce = nn.Linear(len(self.embedding.columns) * width, width)
        self.head = MLP(((schema.num_tokens + num_pooled) * width, *config.head_hidden, 1), config.dropout)

    def _candidate(self, config: InterFormerConfig, schema: Schema) -> nn.Linear:
        if not schema.candidate:
            raise ValueError(f"{type(self).__name__}: schema.candidate must name the candidate's fields, found none")
        return nn.Linear(len(schema.candidate) * config.embed_dim, config.embed_dim)

    def forward(self, batch: Batch) -> Tensor:
        batch = batch if self.reads_requests else batch.unshared()
        x = self.embedding.tokens(batch)  # [B, n, E]
        events = self.lce(self.embedding.events(batch))  # [T, E]
        return self.head(torch.cat((x.flatten(1), self.pool(x, events, batch)), 1)).squeeze(1)

    @abstractmethod
    def pool(self, x: Tensor, events: Tensor, batch: Batch) -> Tensor:
        """The head's input from the history: `x [B, n, E]`, `events [T, E]` -> `[B, num_pooled * E]`."""


class MeanPooling(WithEvents):
    """The mean of the events concatenated with the other features, and an MLP."""

    reads_requests = True

    def __init__(self, config: InterFormerConfig, schema: Schema) -> None:
        super().__init__(config, schema, num_pooled=1)

    def pool(self, x: Tensor, events: Tensor, batch: Batch) -> Tensor:
        mean = pool_mean(events, batch.offsets, self.config.backend)
        return mean.index_select(0, batch.request_of_each())


class DIN(WithEvents):
    """Deep Interest Network (Zhou et al., 2018): a sum of events weighted by an MLP of event and candidate.

    `a_t = mlp([e_t | c | e_t - c | e_t * c])`, `u = sum_t a_t e_t`, not normalised; `c` is a linear map of the
    candidate's fields. The MLP has the hidden widths `interaction_hidden` and SiLU (the paper has Dice).
    """

    def __init__(self, config: InterFormerConfig, schema: Schema) -> None:
        super().__init__(config, schema, num_pooled=2)
        self.candidate = self._candidate(config, schema)
        self.weigh = MLP((4 * config.embed_dim, *config.interaction_hidden, 1))

    def pool(self, x: Tensor, events: Tensor, batch: Batch) -> Tensor:
        candidate = self.candidate(self.embedding.candidate_of(x))  # [B, E]
        c = candidate.index_select(0, row_of_tokens(batch.offsets, events.shape[0]))  # [T, E]
        weights = self.weigh(torch.cat((events, c, events - c, events * c), 1))  # [T, 1]
        summed = jagged_weighted_sum(weights.squeeze(1), events, batch.offsets, backend=self.config.backend)
        return torch.cat((summed, candidate), 1)


class BST(WithEvents):
    """Like the Behavior Sequence Transformer (Chen et al., 2019): a transformer over the events and the candidate.

    `num_layers` encoder layers (post-norm, feed-forward of width `4 E`) over each row with its candidate prepended; the
    head reads the candidate's output and the mean of all outputs. Differences from the paper: positions enter by rotary
    embedding instead of embeddings of time gaps, and the paper's head reads all outputs, which needs rows of one
    length.
    """

    def __init__(self, config: InterFormerConfig, schema: Schema) -> None:
        super().__init__(config, schema, num_pooled=2)
        self.candidate = self._candidate(config, schema)
        self.rope = RotaryTables(1 + config.max_history, config.embed_dim // config.num_heads, config.rope_base)
        self.layers = nn.ModuleList(_EncoderLayer(config) for _ in range(config.num_layers))

    def pool(self, x: Tensor, events: Tensor, batch: Batch) -> Tensor:
        layout = Layout.from_offsets(batch.offsets, events.shape[0], num_cls=1, num_recent=0)
        tokens = layout.prepend(self.candidate(self.embedding.candidate_of(x))[:, None], events)
        for layer in self.layers:
            tokens = layer(tokens, layout.offsets, self.rope())
        pooled = pool_mean(tokens, layout.offsets, self.config.backend)
        return torch.cat((layout.take_cls(tokens).flatten(1), pooled), 1)


class _EncoderLayer(nn.Module):
    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.attention, self.attention_norm = SelfAttention(config, num_prefix=1), nn.LayerNorm(width)
        self.feed_forward, self.feed_forward_norm = MLP((width, 4 * width, width), config.dropout), nn.LayerNorm(width)

    def forward(self, tokens: Tensor, offsets: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        tokens = self.attention_norm(tokens + self.attention(tokens, offsets, rope))
        return self.feed_forward_norm(tokens + self.feed_forward(tokens))


class HSTU(WithEvents):
    """Like HSTU's ranking model (Zhai et al., 2024): a request's history and its candidates are one row of tokens.

    Candidates are the last tokens of the row. Each sees the whole history and itself, and none of the others, so its
    logit is that of a request with this candidate alone. The head reads the candidate's output. Differences from the
    paper: events and actions are not interleaved, and time enters by the events' fields instead of a bias by
    differences of times.
    """

    reads_requests = True

    def __init__(self, config: InterFormerConfig, schema: Schema) -> None:
        super().__init__(config, schema, num_pooled=1)
        self.candidate = self._candidate(config, schema)
        self.layers = nn.ModuleList(_HSTULayer(config) for _ in range(config.num_layers))

    def pool(self, x: Tensor, events: Tensor, batch: Batch) -> Tensor:
        rows = _CandidatesBehind.of(batch)
        candidates = self.candidate(self.embedding.candidate_of(x))  # [B, E]
        tokens = events.new_empty(len(events) + len(candidates), events.shape[1])
        tokens.index_copy_(0, rows.events, events).index_copy_(0, rows.candidates, candidates.to(tokens.dtype))
        for layer in self.layers:
            tokens = layer(tokens, rows.offsets, rows.num_candidates)
        return tokens.index_select(0, rows.candidates)


class _CandidatesBehind(NamedTuple):
    """The layout of rows of a request's events and its candidates behind them; events of no row stay behind all rows.

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
    def of(cls, batch: Batch) -> _CandidatesBehind:
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


class _HSTULayer(nn.Module):
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
        bias = self.position() if q.dtype == torch.float64 else self.position().float()  # not of 16 bits
        a = jagged_attention(
            q, k, v, offsets, causal=True, num_targets=num_targets, score="silu", post_scale=1 / self.longest,
            position_bias=bias, backend=self.backend,
        )  # fmt: skip
        assert isinstance(a, Tensor)
        return tokens + self.dropout(self.out(self.norm_out(a.flatten(1)) * u))
