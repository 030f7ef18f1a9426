"""The Interaction Arch (docs/interformer.md, section 4, equation 7): `X' = mlp(interaction([X | S_sum]))`.

Axes: `B` rows, `m` input tokens (`n` of the non-sequence side and the sequence summary), `n` output tokens, `E` model
width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from interformer.config import InterFormerConfig
from interformer.layers import MLP, SharedTokens, TokenLCE


class DotInteraction(nn.Module):
    """Backbone `dot`: inner products of all pairs of different tokens, `z [B, m, E] -> [B, m(m-1)/2]`."""

    pairs: Tensor

    def __init__(self, num_in: int) -> None:
        super().__init__()
        row, column = torch.triu_indices(num_in, num_in, offset=1)
        self.register_buffer("pairs", row * num_in + column, persistent=False)
        self.num_features = num_in * (num_in - 1) // 2

    def forward(self, z: Tensor) -> Tensor:
        return (z @ z.mT).flatten(1).index_select(1, self.pairs)

    def shared(self, z: SharedTokens, every: Tensor, mlp: MLP) -> Tensor:
        """`mlp` of the same, `every = z.all()`; pairs of shared tokens, which come last, are multiplied per request."""
        own, shared = z.own.shape[1], z.shared.shape[1]
        of_own, of_shared = self.pairs.tensor_split((self.num_features - shared * (shared - 1) // 2,))
        row, column = of_shared // (own + shared) - own, of_shared % (own + shared) - own
        products = (z.own @ every.mT).flatten(1).index_select(1, of_own)
        products_of_shared = (z.shared @ z.shared.mT).flatten(1).index_select(1, row * shared + column)
        return mlp.behind_first(z.linear(mlp.first, products, products_of_shared))


class CrossInteraction(nn.Module):
    """Backbone `dcnv2`: cross layers `x_{l+1} = x_0 * (W x_l + b) + x_l` on `x_0 = vec z`, `[B, m, E] -> [B, mE]`.

    `W = up @ down` has low rank.
    """

    def __init__(self, num_in: int, config: InterFormerConfig, num_layers: int) -> None:
        super().__init__()
        self.num_features = num_in * config.embed_dim
        rank = config.cross_rank
        self.down = nn.ModuleList(nn.Linear(self.num_features, rank, bias=False) for _ in range(num_layers))
        self.up = nn.ModuleList(nn.Linear(rank, self.num_features) for _ in range(num_layers))

    def forward(self, z: Tensor) -> Tensor:
        first = x = z.flatten(1)
        for down, up in zip(self.down, self.up, strict=True):
            x = torch.addcmul(x, first, up(down(x)))
        return x

    def shared(self, z: SharedTokens, every: Tensor, mlp: MLP) -> Tensor:
        """`mlp` of the same, `every = z.all()`; the first product with `down` is made once per request."""
        first = x = every.flatten(1)
        for i, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            low = down(x) if i else z.linear(down, z.own.flatten(1), z.shared.flatten(1))
            x = torch.addcmul(x, first, up(low))
        return mlp(x)


class Backbone(nn.Module):
    """One interaction followed by an MLP: `z [B, m, E] -> [B, n, E]`."""

    def __init__(self, interaction: DotInteraction | CrossInteraction, num_out: int, config: InterFormerConfig) -> None:
        super().__init__()
        self.interaction = interaction
        self.num_out = num_out
        widths = (interaction.num_features, *config.interaction_hidden, num_out * config.embed_dim)
        self.mlp = MLP(widths, config.dropout)

    def forward(self, z: Tensor) -> Tensor:
        return self.mlp(self.interaction(z)).unflatten(1, (self.num_out, -1))

    def shared(self, z: SharedTokens, every: Tensor) -> Tensor:
        """The same of tokens of which some are shared; `every` is `z.all()`."""
        return self.interaction.shared(z, every, self.mlp).unflatten(1, (self.num_out, -1))


class DHENLayer(nn.Module):
    """One layer of backbone `dhen`: `LayerNorm(dot(z) + dcnv2(z) + lce(z))`, `z [B, m, E] -> [B, n, E]`."""

    def __init__(self, num_in: int, num_out: int, config: InterFormerConfig) -> None:
        super().__init__()
        self.dot = Backbone(DotInteraction(num_in), num_out, config)
        self.cross = Backbone(CrossInteraction(num_in, config, 1), num_out, config)
        self.shortcut = TokenLCE(num_in, num_out)
        self.norm = nn.LayerNorm(config.embed_dim)

    def forward(self, z: Tensor) -> Tensor:
        return self.norm(self.dot(z) + self.cross(z) + self.shortcut(z))

    def shared(self, z: SharedTokens, every: Tensor) -> Tensor:
        """The same of tokens of which some are shared; `every` is `z.all()`."""
        return self.norm(self.dot.shared(z, every) + self.cross.shared(z, every) + self.shortcut.shared(z))


class InteractionArch(nn.Module):
    """Section 4: `x [B, n, E]` and `s_sum [B, S+M+K, E]` (None without a sequence side) -> `X' [B, n, E]`."""

    def __init__(self, config: InterFormerConfig, num_tokens: int, num_summary: int) -> None:
        super().__init__()
        num_in, depth = num_tokens + num_summary, config.backbone_layers
        if config.backbone == "dot":
            self.backbone: nn.Module = Backbone(DotInteraction(num_in), num_tokens, config)
        elif config.backbone == "dcnv2":
            self.backbone = Backbone(CrossInteraction(num_in, config, depth), num_tokens, config)
        else:
            sizes = (num_in, *[num_tokens] * depth)
            layers = (DHENLayer(wide, narrow, config) for wide, narrow in pairwise(sizes))
            self.backbone = nn.Sequential(*layers)

    def forward(self, x: Tensor, s_sum: Tensor | None) -> Tensor:
        return self.backbone(x if s_sum is None else torch.cat((x, s_sum), 1))

    def shared(self, z: SharedTokens) -> Tensor:
        """`X' [C, n, E]` of candidates, whose last tokens are their requests'."""
        stacked = isinstance(self.backbone, nn.Sequential)
        first, *later = self.backbone if stacked else (self.backbone,)
        x = first.shared(z, z.all())
        for layer in later:
            x = layer(x)
        return x
