"""The Cross Arch (docs/interformer.md, section 3): summaries of each side that the other side consumes.

Axes: `B` rows, `n` non-sequence tokens, `T` tokens of all rows in the jagged layout (CLS tokens in front of each row),
`E` model width, `H` heads of `D = E / H`, `S` CLS tokens, `M` PMA seeds, `K` recent tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interformer.batch import Layout
from interformer.config import InterFormerConfig
from interformer.layers import MLP, Gating, TokenLCE
from interformer.sequence import SelfAttention
from interformer_kernels import pma_pooling
from interformer_kernels.ops.pma_folded import folding_wins, pool_folded


def pool_mean(tokens: Tensor, offsets: Tensor, backend: str | None) -> Tensor:
    """The mean of every row, zero for an empty one: `tokens [T, E] -> [B, E]`.

    It is pooling by a query of zeros, whose scores are all equal: one pass, with deterministic gradients.
    """
    pooled = pma_pooling(tokens.new_zeros(1, 1, tokens.shape[1]), tokens[:, None], None, offsets, backend=backend)
    assert isinstance(pooled, Tensor)
    return pooled.flatten(1)


class PMA(nn.Module):
    """Multi-head attention of learned queries over all tokens of a row: `tokens [T, E]`, `offsets` -> `[B, M, E]`.

    Form `bare`: softmax, scale `1/sqrt(D)`, with `W_Q` (applied to the queries), `W_K`, `W_V`, `W_O`, without biases,
    residual and norm. Form `mab`, Set Transformer's (Lee et al., 2019, as its authors' code has it): scale
    `1/sqrt(E)`, the projected queries as residual, `H = norm(q + A)`, `out = norm(H + relu(W_O H))`, with biases.

    Where it is cheaper, the kernels pool raw tokens, with `W_K` folded into the queries and `W_V` applied to the pooled
    tokens; the reference always projects, as in the formula.
    """

    def __init__(self, config: InterFormerConfig, num_seeds: int) -> None:
        super().__init__()
        width, self.mab = config.embed_dim, config.pma == "mab"
        self.num_heads, self.backend = config.num_heads, config.backend
        self.scale = (width if self.mab else width // config.num_heads) ** -0.5
        self.seeds = nn.Parameter(torch.randn(num_seeds, width))
        self.query = nn.Linear(width, width, bias=self.mab)
        self.key_value = nn.Linear(width, 2 * width, bias=self.mab)
        self.out = nn.Linear(width, width, bias=self.mab)
        if self.mab:
            self.attention_norm, self.out_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        query = self.query(self.seeds)  # [M, E]
        attn_out = self._attend(query.unflatten(-1, (self.num_heads, -1)), tokens, offsets).flatten(-2)
        if not self.mab:
            return self.out(attn_out)
        hidden = self.attention_norm(query + attn_out)
        return self.out_norm(hidden + torch.relu(self.out(hidden)))

    def _attend(self, seeds: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
        """`seeds [M, H, D]` over the rows of `tokens [T, E]`: `[B, M, H, D]`."""
        if self.backend != "reference" and folding_wins(seeds.shape[0] * self.num_heads, tokens.shape[1]):
            key, value = self.key_value.weight.chunk(2)
            bias = self.key_value.bias.chunk(2)[1] if self.mab else None
            return pool_folded(seeds, key, value, bias, tokens, offsets, scale=self.scale, backend=self.backend)
        k, v = self.key_value(tokens).unflatten(-1, (2, self.num_heads, -1)).unbind(1)  # [T, H, D] each
        pooled = pma_pooling(seeds, k, v, offsets, scale=self.scale, backend=self.backend)
        assert isinstance(pooled, Tensor)
        return pooled


class SeedProducts(nn.Module):
    """Kunlun's hierarchical seed pooling (arXiv 2602.10016), its second level: `out = sum_r L_r P R_r`.

    It reduces `P [B, M', E]`, pooled by `M' > M` seeds, to `[B, M, E]` by a few products with small matrices
    `L_r [M, M']` on the left and `R_r [E, E]` on the right.
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        products, width = config.pool_products, config.embed_dim
        self.left = nn.Parameter(torch.empty(products, config.num_seeds, config.pool_seeds))
        self.right = nn.Parameter(torch.empty(products, width, width))
        nn.init.normal_(self.left, std=config.pool_seeds**-0.5)
        nn.init.normal_(self.right, std=(products * width) ** -0.5)

    def forward(self, pooled: Tensor) -> Tensor:
        left = (self.left.flatten(0, 1) @ pooled).unflatten(1, self.left.shape[:2])  # [B, products, M, E]
        return left.transpose(1, 2).flatten(2) @ self.right.flatten(0, 1)  # One product sums over channels and `r`.


class SelectiveSummary(nn.Module):
    """Equation 11: `S_sum = Gating([CLS | PMA | recent])`, `tokens [T, E] -> [B, S+M+K, E]`; each part is optional.

    Missing recent behaviours are zero, also after the gate.
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        self.num_recent = config.num_recent
        self.pma = PMA(config, config.pool_seeds or config.num_seeds) if config.num_seeds else None
        self.products = SeedProducts(config) if config.num_seeds and config.pool_seeds else None
        self.gate = Gating(config)

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        summary = layout.take_summary(tokens)
        if self.pma is not None:
            pooled = self.pma(tokens, layout.offsets)
            pooled = pooled if self.products is None else self.products(pooled)
            recent = summary.shape[1] - self.num_recent  # index of the first recent behaviour
            summary = torch.cat((summary[:, :recent], pooled, summary[:, recent:]), 1)
        gated: Tensor = self.gate(summary)
        if self.gate.keeps_zeros:
            return gated
        held = layout.valid[:, layout.valid.shape[1] - self.num_recent :]  # [B, K]
        always = held.new_ones(held.shape[0], gated.shape[1] - held.shape[1])
        return gated.where(torch.cat((always, held), 1)[..., None], 0)


class MeanSummary(nn.Module):
    """The paper's simpler summaries: `S_sum = Gating(mean(f(tokens)))`, `tokens [T, E] -> [B, 1, E]`.

    `f` is the identity (`mean`), an MLP of every token (`mlp`), or self-attention inside the row (`mha`).
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        self.kind, self.backend = config.summary, config.backend
        if self.kind == "mlp":
            self.mlp = MLP((config.embed_dim,) * 3)
        elif self.kind == "mha":
            self.attention = SelfAttention(config, config.cls_tokens)
        self.gate = Gating(config)

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        if self.kind == "mlp":
            tokens = self.mlp(tokens)
        elif self.kind == "mha":
            tokens = self.attention(tokens, layout.offsets)
        return self.gate(pool_mean(tokens, layout.offsets, self.backend)[:, None])


SUMMARIES: dict[str, type[SelectiveSummary] | type[MeanSummary]] = {
    "selective": SelectiveSummary,
    "mean": MeanSummary,
    "mlp": MeanSummary,
    "mha": MeanSummary,
}


class CrossArch(nn.Module):
    """One layer's Cross Arch: `forward(x [B, n, E])` returns `X_sum [B, S, E]`, which the sequence side consumes;
    `summarize(tokens [T, E], layout)` returns `S_sum`, which the static side consumes.

    `X_sum = Gating(lce_x(X))`; if the static side does not feed the sequence, learned tokens, the same for all rows,
    replace it. A summary that nothing consumes is not computed: it is None.

    Args:
        first: whether its `X_sum` become the CLS tokens.
        last: whether only the head consumes its summaries.
    """

    def __init__(self, config: InterFormerConfig, num_tokens: int, first: bool, last: bool) -> None:
        super().__init__()
        feeds_pffn = config.pffn != "none" and not last
        feeds_sequence = config.has_sequence and (feeds_pffn or (first and config.cls))
        feeds_candidates = config.once_per_request
        self.lce: TokenLCE | None = None
        self.tokens: nn.Parameter | None = None
        self.sequence_summary: nn.Module | None = None
        if last or feeds_candidates or (feeds_sequence and config.to_sequence):
            self.lce, self.gate = TokenLCE(num_tokens, config.num_cls), Gating(config)
        elif feeds_sequence:
            self.tokens = nn.Parameter(torch.randn(config.num_cls, config.embed_dim))
        if config.has_sequence and (last or config.to_static):
            self.sequence_summary = SUMMARIES[config.summary](config)

    def forward(self, x: Tensor) -> Tensor | None:
        if self.lce is not None:
            return self.gate(self.lce(x))
        return None if self.tokens is None else self.tokens.repeat(x.shape[0], 1, 1)

    def summarize(self, tokens: Tensor, layout: Layout) -> Tensor | None:
        return None if self.sequence_summary is None else self.sequence_summary(tokens, layout)
