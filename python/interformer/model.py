"""InterFormer (arXiv 2411.09852), jagged throughout; sections are those of INTERFORMER.md."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interformer.batch import Batch, Layout
from interformer.config import InterFormerConfig
from interformer.interaction import InteractionArch
from interformer.layers import MLP, CrossArch, MaskNet, RotaryTables, SequenceArch
from interformer.schema import Field, Schema


class Embedding(nn.Module):
    """Section 1: the batch's fields as tokens. Fields of one table share its rows.

    `tokens(batch)` is `X [B, n, E]`: one token of all dense scalars together (where there are any), then one a
    categorical field. `events(batch)` is `Sc [T, kE]`. No norm, no bias.
    """

    def __init__(self, config: InterFormerConfig, schema: Schema) -> None:
        super().__init__()
        self.schema = schema
        self.tables = nn.ModuleDict()
        for name, size in schema.tables.items():
            self.tables[name] = table = nn.Embedding(size, config.embed_dim)
            nn.init.normal_(table.weight, std=config.embedding_std)
        self.dense = nn.Linear(len(schema.dense), config.embed_dim, bias=False) if schema.dense else None
        self.dropout = nn.Dropout(config.embedding_dropout)

    def _look_up(self, side: str, ids: Tensor) -> list[Tensor]:
        fields: tuple[Field, ...] = getattr(self.schema, side)
        if ids.dim() != 2 or ids.shape[1] != len(fields):
            wanted = f"batch.{side} must have one column for each of {', '.join(field.name for field in fields)}"
            raise ValueError(f"InterFormer: {wanted}; found shape {list(ids.shape)}")
        return [self.tables[field.table](ids[:, i]) for i, field in enumerate(fields)]

    def tokens(self, batch: Batch) -> Tensor:
        found = self._look_up("categorical", batch.categorical)
        if self.dense is not None:
            found.insert(0, self.dense(batch.dense.to(self.dense.weight.dtype)))
        return self.dropout(torch.stack(found, 1))

    def events(self, batch: Batch) -> Tensor:
        return self.dropout(torch.cat(self._look_up("sequences", batch.sequences), 1))


def num_summary(config: InterFormerConfig) -> int:
    """Tokens of `S_sum`: CLS, PMA and recent."""
    return config.num_cls + config.num_seeds + config.num_recent


class InterFormer(nn.Module):
    """The whole model: `Batch -> logits [B]`; the click probability is their sigmoid.

    1. `X`, `Sc` from the embeddings; `S0 = MaskNet(Sc)` (section 1).
    2. `X_sum` of the first Cross Arch in front of every row as CLS tokens, once (section 6).
    3. Each layer: Cross Arch, then Interaction and Sequence Arch side by side (sections 3 to 5).
    4. One more Cross Arch, head `mlp([X_sum | S_sum]) -> 1` (section 6).

    In the printed form (`config.literal`) the head reads the last layer's Cross Arch, so that the last layer's two
    arches reach nothing: that layer is made without them.
    Histories may be empty: such a row keeps its CLS tokens. Nothing is padded, and a row's logit does not depend on
    its neighbours. Parameters and their names are the same whatever `config.backend`.
    """

    def __init__(self, config: InterFormerConfig, schema: Schema) -> None:
        super().__init__()
        self.config, self.schema = config, schema
        width, n, summary = config.embed_dim, schema.num_tokens, num_summary(config)
        depth = config.num_layers - config.literal
        self.embedding = Embedding(config, schema)
        self.mask_net = MaskNet(config, len(schema.sequences))
        self.rope = RotaryTables(config.num_cls + config.max_history, width // config.num_heads, config.rope_base)
        self.cross = nn.ModuleList(CrossArch(config, n) for _ in range(depth + 1))
        self.interaction = nn.ModuleList(InteractionArch(config, n, summary) for _ in range(depth))
        self.sequence = nn.ModuleList(SequenceArch(config) for _ in range(depth))
        self.head = MLP(((config.num_cls + summary) * width, *config.head_hidden, 1), config.dropout)

    def forward(self, batch: Batch) -> Tensor:
        config, rope = self.config, self.rope()
        layout = Layout.of(batch.offsets, batch.sequences.shape[0], config.num_cls, config.num_recent)
        first, *rest = self.cross
        x = self.embedding.tokens(batch)  # [B, n, E]
        x_sum = first.summarize(x)  # [B, S, E]
        tokens = layout.prepend(x_sum, self.mask_net(self.embedding.events(batch)))  # [T + B*S, E]
        s_sum = first.summarize_sequence(tokens, layout)  # [B, S+M+K, E]
        for interaction, sequence, cross in zip(self.interaction, self.sequence, rest, strict=True):
            x, tokens = interaction(x, s_sum), sequence(tokens, x_sum, layout.offsets, rope)
            x_sum, s_sum = cross(x, tokens, layout)
        return self.head(torch.cat((x_sum, s_sum), 1).flatten(1)).squeeze(1)
