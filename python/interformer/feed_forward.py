"""The personalised feed-forward (docs/interformer.md, section 5), in every mode that the authors published.

Each mode maps `tokens [T, E]`, `x_sum [B, S, E]` and `offsets [B+1]` to `[T, E]`.
Axes: `B` rows, `T` tokens of all rows, `S` summary tokens, `E` model width, `H` heads of `D = E / H`, `F` inner width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from interformer.config import InterFormerConfig
from interformer.layers import MLP
from interformer_kernels import gated_cross_attention, personalized_ffn


class WeightGenerator(nn.Module):
    """Generates each row's weights: an MLP of `vec x_sum`, whose output is split into matrices of `sizes` entries.

    At initialisation the entries of a matrix have its standard deviation in `stds` and are nearly the same for all
    rows: the part that depends on `x_sum` is smaller by `sqrt(E)`.
    """

    def __init__(self, config: InterFormerConfig, sizes: Sequence[int], stds: Sequence[float]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.mlp = MLP((config.num_cls * config.embed_dim, *config.pffn_hidden, sum(sizes)))
        last = self.mlp.last
        with torch.no_grad():
            last.weight /= config.embed_dim**0.5
            for bias, std in zip(last.bias.split(self.sizes), stds, strict=True):
                bias.normal_(std=std)

    def forward(self, x_sum: Tensor) -> tuple[Tensor, ...]:
        return self.mlp(x_sum.flatten(1)).split(self.sizes, 1)


class MLPFeedForward(nn.Module):
    """Mode `mlp`, equation 8: `out_t = s_t @ W_b`, `W_b = reshape(mlp(vec X_sum_b)) [E, E]`."""

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        width, self.backend = config.embed_dim, config.backend
        self.generate = WeightGenerator(config, [width * width], [width**-0.5])

    def forward(self, tokens: Tensor, x_sum: Tensor, offsets: Tensor) -> Tensor:
        (weight,) = self.generate(x_sum)
        width = tokens.shape[1]
        return personalized_ffn(tokens, weight.unflatten(1, (width, width)), offsets, backend=self.backend)


class RankFeedForward(nn.Module):
    """Mode `rank`, Appendix A.2.2: `out_t = (s_t @ W) @ X_sum_b`, with learned `W [E, S]`.

    It equals attention with identity score, scale 1, keys `W` and values `X_sum_b`.
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        self.backend = config.backend
        self.weight = nn.Parameter(torch.empty(config.embed_dim, config.num_cls))
        nn.init.normal_(self.weight, std=config.embed_dim**-0.5)

    def forward(self, tokens: Tensor, x_sum: Tensor, offsets: Tensor) -> Tensor:
        return personalized_ffn(tokens @ self.weight, x_sum, offsets, backend=self.backend)


class TwoLayerFeedForward(nn.Module):
    """Mode `two_layer` (arXiv 2512.23236): `norm(gelu(s_t @ W1_b + b1_b) @ W2_b + b2_b)`.

    `W1_b [E, F]`, `b1_b [F]`, `W2_b [F, E]`, `b2_b [E]` come from an MLP of `vec X_sum_b`. Without `norm` and biases it
    is mode `gdpa` with one head, keys `W1_b` and values `W2_b`.
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        width, inner, self.backend = config.embed_dim, config.pffn_inner, config.backend
        sizes, stds = [width * inner, inner, inner * width, width], [width**-0.5, 0.0, inner**-0.5, 0.0]
        self.generate = WeightGenerator(config, sizes, stds)
        self.norm: nn.Module = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, x_sum: Tensor, offsets: Tensor) -> Tensor:
        w1, b1, w2, b2 = self.generate(x_sum)
        width = tokens.shape[1]
        w1, w2 = w1.unflatten(1, (width, -1)), w2.unflatten(1, (-1, width))
        hidden = personalized_ffn(tokens, w1, offsets, bias=b1, activation="gelu", backend=self.backend)  # [T, F]
        return self.norm(personalized_ffn(hidden, w2, offsets, bias=b2, backend=self.backend))


class GDPAFeedForward(nn.Module):
    """Mode `gdpa` (arXiv 2602.10016): per head `gelu(s_t W1_b / tau) W2_b`, attention without softmax.

    For every head, the columns of `W1_b [D, F]` are `F` keys and the rows of `W2_b [F, D]` their values, from an MLP of
    `vec X_sum_b`. The residual is added by the Sequence Arch, but in the literal form, which has none there, here.
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        width, inner = config.embed_dim, config.pffn_inner
        self.num_heads, self.inner, self.scale = config.num_heads, inner, 1 / config.pffn_tau
        self.residual, self.backend = config.literal, config.backend
        head = width // config.num_heads
        self.generate = WeightGenerator(config, [inner * width] * 2, [head**-0.5, inner**-0.5])

    def forward(self, tokens: Tensor, x_sum: Tensor, offsets: Tensor) -> Tensor:
        heads = (self.num_heads, tokens.shape[1] // self.num_heads)
        queries = tokens.unflatten(1, heads)  # [T, H, D]
        # Always copied: a copy only of non-contiguous slices would specialise an exported program to more than one row.
        matrices = (entries.clone(memory_format=torch.contiguous_format) for entries in self.generate(x_sum))
        keys, values = (entries.view(-1, *heads) for entries in matrices)  # [B*F, H, D] each
        attn_out = gated_cross_attention(
            queries,
            keys,
            values,
            self.inner * torch.arange(offsets.shape[0], device=offsets.device),
            q_offsets=offsets,
            score="gelu",
            scale=self.scale,
            residual=queries if self.residual else None,
            backend=self.backend,
        )
        assert isinstance(attn_out, Tensor)
        return attn_out.flatten(1)


FEED_FORWARDS: dict[str, type[nn.Module]] = {
    "mlp": MLPFeedForward,
    "rank": RankFeedForward,
    "two_layer": TwoLayerFeedForward,
    "gdpa": GDPAFeedForward,
}
