"""InterFormer (arXiv 2411.09852), jagged throughout; sections refer to docs/interformer.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from interformer.batch import Batch, Layout
from interformer.config import InterFormerConfig
from interformer.cross import CrossArch
from interformer.embedding import Embedding
from interformer.interaction import InteractionArch
from interformer.layers import MLP, MaskNet, RotaryTables
from interformer.schema import Schema
from interformer.sequence import SequenceArch
from interformer.shared import CandidateSide, RequestState, SplitEmbedding


class InterFormer(nn.Module):
    """The whole model: `Batch -> logits [B]`; the click probability is their sigmoid.

    1. `X`, `Sc` from the embeddings; `S0 = MaskNet(Sc)` (section 1).
    2. `X_sum` of the first Cross Arch is prepended to every row as CLS tokens, once (section 6).
    3. Each layer: Cross Arch, then Interaction and Sequence Arch side by side (sections 3 to 5).
    4. One more Cross Arch, head `mlp([X_sum | S_sum]) -> 1` (section 6).

    In the printed form (`config.literal`) the head reads the last layer's Cross Arch. Nothing would consume the last
    layer's Interaction and Sequence Arch, so that layer has none. `config.flow` decides which side feeds the other;
    modules whose output nothing consumes are not created, so every parameter gets gradients.
    With `config.shared == "request"` everything above is computed once per request, from its fields alone, and
    candidates read it (`shared.py`, section 8); `read_requests` and `score` are the two halves.
    A row with an empty history keeps its CLS tokens. Nothing is padded, and a row's logit does not depend on other
    rows. Parameters and their names are the same for every `config.backend`.
    """

    def __init__(self, config: InterFormerConfig, schema: Schema) -> None:
        super().__init__()
        self.config, self.schema = config, schema
        width, n = config.embed_dim, schema.num_tokens
        depth = config.num_layers - config.literal
        num_summary = config.num_summary if config.to_static else 0
        if not config.once_per_request:
            self.embedding = Embedding(config, schema, config.has_sequence)
        else:
            self.embedding = SplitEmbedding(config, schema)
            n = self.embedding.num_request_tokens
        self.cross = nn.ModuleList(CrossArch(config, n, i == 0, i == depth) for i in range(depth + 1))
        self.interaction = nn.ModuleList(InteractionArch(config, n, num_summary) for _ in range(depth))
        if config.has_sequence:
            self.mask_net = MaskNet(config, len(self.embedding.columns))
            positions = config.cls_tokens + config.max_history
            self.rope = RotaryTables(positions, width // config.num_heads, config.rope_base)
            self.sequence = nn.ModuleList(SequenceArch(config) for _ in range(depth))
        if not config.once_per_request:
            self.head = MLP(((config.num_cls + config.num_summary) * width, *config.head_hidden, 1), config.dropout)
        else:
            self.candidates = CandidateSide(config, self.embedding.num_candidate_tokens)

    def forward(self, batch: Batch) -> Tensor:
        if self.config.once_per_request:
            state = self.read_requests(*self.embedding.request_inputs(batch), batch.sequences, batch.offsets)
            return self.score(state, *self.embedding.candidate_inputs(batch), batch.request_of_each())
        batch = batch.unshared()
        x = self.embedding.tokens(batch)  # [B, n, E]
        if not self.config.has_sequence:
            return self.head(self._static_side(x).flatten(1)).squeeze(1)
        return self.head(self._both_sides(x, batch).flatten(1)).squeeze(1)

    def read_requests(self, dense: Tensor, categorical: Tensor, sequences: Tensor, offsets: Tensor) -> RequestState:
        """The state of requests, which candidates read, from their columns (`SplitEmbedding.request_inputs`)."""
        self._check_shared("read_requests")
        unknown = offsets.new_zeros(offsets.shape[0] - 1)
        requests = Batch(dense, categorical, sequences, offsets, label=unknown, user=unknown)
        x = self.embedding.request_tokens(dense, categorical)  # [R, n_r, E]
        keys_values: list[Tensor] = []
        summaries: list[Tensor] = []

        def keep(made: _CrossOutputs) -> None:
            keys_values.append(self.candidates.keys_and_values[len(keys_values)](made.tokens))
            summaries.append(made.summary())

        last = self._layers(x, requests, keep)
        return RequestState(tuple(keys_values), tuple(summaries), last.offsets)

    def score(self, state: RequestState, dense: Tensor, categorical: Tensor, rows: Tensor) -> Tensor:
        """Logits `[C]` of candidates, from their columns (`SplitEmbedding.candidate_inputs`), their requests `rows [C]`
        and the state of these."""
        self._check_shared("score")
        return self.candidates(self.embedding.candidate_tokens(dense, categorical), state, rows)

    def _check_shared(self, method: str) -> None:
        if not self.config.once_per_request:
            found = self.config.shared
            raise ValueError(f"InterFormer.{method}: config.shared must be 'request', found {found!r}")

    def _static_side(self, x: Tensor) -> Tensor:
        """`X_sum [B, S, E]` of the last Cross Arch."""
        for interaction in self.interaction:
            x = interaction(x, None)
        return self.cross[-1](x)

    def _layout(self, batch: Batch) -> Layout:
        num_cls, num_recent = self.config.cls_tokens, self.config.num_recent
        return Layout.from_offsets(batch.offsets, batch.sequences.shape[0], num_cls, num_recent)

    def _both_sides(self, x: Tensor, batch: Batch) -> Tensor:
        """`[X_sum | S_sum]` of the last Cross Arch, `[B, S + (S+M+K), E]`."""
        return self._layers(x, batch, lambda made: None).summary()

    def _layers(self, x: Tensor, batch: Batch, each: Callable[[_CrossOutputs], None]) -> _CrossOutputs:
        """The last Cross Arch's summaries and rows; `each` gets those of all of them, in the order of the layers."""
        config, rope = self.config, self.rope()
        layout = self._layout(batch)
        first, *later_arches = self.cross
        x_sum = first(x)  # [B, S, E]
        tokens = self.mask_net(self.embedding.events(batch))  # [T, E]
        if config.cls:
            tokens = layout.prepend(x_sum, tokens)  # [T + B*S, E]
        s_sum = first.summarize(tokens, layout)  # [B, S+M+K, E], or None if nothing consumes it
        made = _CrossOutputs(x_sum, s_sum, tokens, layout.offsets)
        each(made)
        for interaction, sequence, cross in zip(self.interaction, self.sequence, later_arches, strict=True):
            x, tokens = interaction(x, s_sum), sequence(tokens, x_sum, layout.offsets, rope)
            x_sum, s_sum = cross(x), cross.summarize(tokens, layout)
            made = _CrossOutputs(x_sum, s_sum, tokens, layout.offsets)
            each(made)
        return made


class _CrossOutputs(NamedTuple):
    """The summaries that a Cross Arch makes, None where nothing consumes one, and the rows that it reads."""

    x_sum: Tensor | None
    s_sum: Tensor | None
    tokens: Tensor
    offsets: Tensor

    def summary(self) -> Tensor:
        """`[X_sum | S_sum]`, `[B, S + (S+M+K), E]`."""
        assert self.x_sum is not None
        assert self.s_sum is not None
        return torch.cat((self.x_sum, self.s_sum), 1)
