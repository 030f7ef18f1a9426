"""Baselines for InterFormer, on the same features, widths and jagged batches.

Each is `Batch -> logits [B]`, made from `InterFormerConfig` (it ignores settings that do not apply) and a `Schema`.
Padding, truncation and one-hot encoding of the papers are replaced by the jagged form; a model that differs in more is
called "-like".
Axes: `B` rows, `T` events, `n` non-sequence tokens, `E` width, `H` heads of `D = E / H`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from interformer.batch import Batch, Layout, row_of_tokens
from interformer.config import InterFormerConfig
from interformer.cross import pool_mean
from interformer.embedding import Embedding, module_key
from interformer.layers import MLP, RotaryTables
from interformer.schema import Schema
from interformer.sequence import SelfAttention
from interformer_kernels import jagged_weighted_sum


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


class _WithEvents(nn.Module, ABC):
    """Base of the deep baselines: tokens `X`, events `e_t = lce(Sc_t) [T, E]`, a head over `X` and pooled events."""

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
        batch = batch.unshared()
        x = self.embedding.tokens(batch)  # [B, n, E]
        events = self.lce(self.embedding.events(batch))  # [T, E]
        return self.head(torch.cat((x.flatten(1), self.pool(x, events, batch)), 1)).squeeze(1)

    @abstractmethod
    def pool(self, x: Tensor, events: Tensor, batch: Batch) -> Tensor:
        """The head's input from the history: `x [B, n, E]`, `events [T, E]` -> `[B, num_pooled * E]`."""


class MeanPooling(_WithEvents):
    """The mean of the events concatenated with the other features, and an MLP."""

    def __init__(self, config: InterFormerConfig, schema: Schema) -> None:
        super().__init__(config, schema, num_pooled=1)

    def pool(self, x: Tensor, events: Tensor, batch: Batch) -> Tensor:
        return pool_mean(events, batch.offsets, self.config.backend)


class DIN(_WithEvents):
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


class BST(_WithEvents):
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
