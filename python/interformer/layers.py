"""The sequence side of InterFormer and what both sides share; sections are those of INTERFORMER.md.

Axes: `B` rows, `n` non-sequence tokens, `T` tokens of all rows in the jagged layout (CLS tokens in front of each row),
`E` model width, `H` heads of `D = E / H`, `S` CLS tokens, `M` PMA seeds, `K` recent tokens, `k` fields of an event.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from interformer.batch import Layout
from interformer.config import InterFormerConfig
from interformer_kernels import jagged_attention, personalized_ffn, pma_pooling

Rope = tuple[Tensor, Tensor]


class MLP(nn.Sequential):
    """Linear layers of widths `widths[0] -> ... -> widths[-1]`, SiLU and dropout between: `[..., in] -> [..., out]`."""

    def __init__(self, widths: Sequence[int], dropout: float = 0.0) -> None:
        layers: list[nn.Module] = []
        for i, (wide, narrow) in enumerate(pairwise(widths)):
            if i:
                layers.append(nn.SiLU())
                if dropout:
                    layers.append(nn.Dropout(dropout))
            layers.append(nn.Linear(wide, narrow))
        super().__init__(*layers)


class MaskNet(nn.Module):
    """Section 1, equation 6: `S0 = lce(Sc * mask(Sc))`, `Sc [T, kE] -> S0 [T, E]`.

    `mask` is a two-layer MLP `kE -> kE -> kE`, its output as it is or through a sigmoid.
    """

    def __init__(self, config: InterFormerConfig, num_sequences: int) -> None:
        super().__init__()
        width = num_sequences * config.embed_dim
        self.mask = MLP((width, width, width))
        self.sigmoid = config.mask_output == "sigmoid"
        self.lce = nn.Linear(width, config.embed_dim)
        # An identity mask starts at one, so that the start is a plain linear map of the events.
        last = self.mask[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, 0.0 if self.sigmoid else 1.0)

    def forward(self, events: Tensor) -> Tensor:
        mask = self.mask(events)
        return self.lce(events * (torch.sigmoid(mask) if self.sigmoid else mask))


_SELF_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "self_identity": lambda z: z,
    "self_tanh": torch.tanh,
    "self_sigmoid": torch.sigmoid,
}


class Gating(nn.Module):
    """Section 2, equation 10: `sigma(Z * g(Z))`, or `Z * sigmoid(g(Z))` for `multiply_sigmoid`; `[..., E] -> [..., E]`.

    `g` is an MLP `E -> E -> E` on the feature axis, the same for all tokens; its output starts around one, so that the
    gate starts as `sigma(Z)` rather than as the square of something small.
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        self.mode = config.gate
        self.g = MLP((config.embed_dim,) * 3)
        last = self.g[-1]
        assert isinstance(last, nn.Linear)
        nn.init.ones_(last.bias)

    def forward(self, z: Tensor) -> Tensor:
        if self.mode == "multiply_sigmoid":
            return z * torch.sigmoid(self.g(z))
        return _SELF_ACTIVATIONS[self.mode](z * self.g(z))


class TokenLCE(nn.Module):
    """Linear compressed embedding on the token axis: `x [B, n, E] -> [B, m, E]` with one matrix `weight [m, n]`."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))
        nn.init.normal_(self.weight, std=num_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x


class PMA(nn.Module):
    """Section 3: bare multi-head attention of `M` learned queries over all tokens of a row, CLS tokens included.

    `tokens [T, E]`, `offsets [B+1]` -> `[B, M, E]`; softmax, scale `1/sqrt(D)`, with `W_Q` (applied to the queries),
    `W_K`, `W_V`, `W_O`, without biases, residual and norm.
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads, self.backend = config.num_heads, config.backend
        self.seeds = nn.Parameter(torch.randn(config.num_seeds, width))
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        seeds = self.query(self.seeds).unflatten(-1, (self.num_heads, -1))  # [M, H, D]
        k, v = self.key_value(tokens).unflatten(-1, (2, self.num_heads, -1)).unbind(1)  # [T, H, D] each
        pooled = pma_pooling(seeds, k, v, offsets, backend=self.backend)
        assert isinstance(pooled, Tensor)
        return self.out(pooled.flatten(-2))


class SequenceSummary(nn.Module):
    """Section 3, equation 11: `S_sum = Gating([CLS | PMA | recent])`, `tokens [T, E] -> [B, S+M+K, E]`.

    Slots of recent behaviours that a row does not have are zero, also after the gate.
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        self.num_recent = config.num_recent
        self.pma = PMA(config) if config.num_seeds else None
        self.gate = Gating(config)

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        parts = [layout.take_cls(tokens)]
        if self.pma is not None:
            parts.append(self.pma(tokens, layout.offsets))
        parts.append(layout.take_recent(tokens))
        gated = self.gate(torch.cat(parts, 1))
        if not self.num_recent:
            return gated
        rest, recent = gated.split((gated.shape[1] - self.num_recent, self.num_recent), 1)
        return torch.cat((rest, recent.where(layout.has_recent[..., None], 0)), 1)


class CrossArch(nn.Module):
    """Section 3: what the two sides tell each other; one per layer, with its own parameters.

    `summarize(x [B, n, E])` is `X_sum = Gating(lce_x(X)) [B, S, E]`; `summarize_sequence(tokens [T, E], layout)` is
    `S_sum [B, S+M+K, E]`.
    """

    def __init__(self, config: InterFormerConfig, num_tokens: int) -> None:
        super().__init__()
        self.lce = TokenLCE(num_tokens, config.num_cls)
        self.gate = Gating(config)
        self.summarize_sequence = SequenceSummary(config)

    def summarize(self, x: Tensor) -> Tensor:
        return self.gate(self.lce(x))

    def forward(self, x: Tensor, tokens: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        return self.summarize(x), self.summarize_sequence(tokens, layout)


class MLPFeedForward(nn.Module):
    """Section 5, mode `mlp`, equation 8: `out_t = s_t @ W_b`, `W_b = reshape(mlp(vec X_sum_b)) [E, E]`.

    `tokens [T, E]`, `x_sum [B, S, E]`, `offsets [B+1]` -> `[T, E]`.
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        width, self.backend = config.embed_dim, config.backend
        self.generate = MLP((config.num_cls * width, *config.pffn_hidden, width * width))
        # W_b is a matrix, not a vector: its entries start at the scale of a linear layer of E inputs.
        last = self.generate[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight /= width**0.5
            last.bias.normal_(std=width**-0.5)

    def forward(self, tokens: Tensor, x_sum: Tensor, offsets: Tensor) -> Tensor:
        width = tokens.shape[1]
        weight = self.generate(x_sum.flatten(1)).unflatten(1, (width, width))
        return personalized_ffn(tokens, weight, offsets, backend=self.backend)


class RankFeedForward(nn.Module):
    """Section 5, mode `rank`, Appendix A.2.2: `out_t = (s_t @ W) @ X_sum_b`, learned `W [E, S]`.

    The same as attention with identity score and scale 1, keys `W`, values `X_sum_b`. Shapes as in `MLPFeedForward`.
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        self.backend = config.backend
        self.weight = nn.Parameter(torch.empty(config.embed_dim, config.num_cls))
        nn.init.normal_(self.weight, std=config.embed_dim**-0.5)

    def forward(self, tokens: Tensor, x_sum: Tensor, offsets: Tensor) -> Tensor:
        return personalized_ffn(tokens @ self.weight, x_sum, offsets, backend=self.backend)


FEED_FORWARDS: dict[str, type[MLPFeedForward] | type[RankFeedForward]] = {
    "mlp": MLPFeedForward,
    "rank": RankFeedForward,
}


class RotaryTables(nn.Module):
    """Tables `cos, sin [P, D/2]` of the rotary embedding (section 5) for positions `0 .. P-1`, always float32.

    They are made anew, not cast, when the model changes its dtype, and are not part of the state dict.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, positions: int, head_dim: int, base: float) -> None:
        super().__init__()
        self.positions, self.head_dim, self.base = positions, head_dim, base
        self._fill(torch.device("cpu"))

    def _fill(self, device: torch.device) -> None:
        rate = self.base ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu") / self.head_dim)
        angle = torch.arange(self.positions, dtype=torch.float64, device="cpu")[:, None] * rate
        self.register_buffer("cos", angle.cos().to(device, torch.float32), persistent=False)
        self.register_buffer("sin", angle.sin().to(device, torch.float32), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTables:
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            self._fill(self.cos.device)
        return self

    def forward(self) -> Rope:
        return self.cos, self.sin


class SelfAttention(nn.Module):
    """Section 5, equation 9: multi-head attention inside each row, bidirectional, rotary, softmax; `[T, E] -> [T, E]`.

    Position is the index in the row with the CLS tokens first. `W_Q, W_K, W_V` in one matrix, and `W_O`, no biases.
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads, self.backend = config.num_heads, config.backend
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor, offsets: Tensor, rope: Rope) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [T, H, D] each
        attended = jagged_attention(q, k, v, offsets, rope=rope, backend=self.backend)
        assert isinstance(attended, Tensor)
        return self.out(attended.flatten(-2))


class SequenceArch(nn.Module):
    """Section 5, equations 8 and 9: `S' = MHA(PFFN(X_sum, S))`, `tokens [T, E] -> [T, E]`.

    By default both halves are pre-norm with a residual; literally, neither norm nor residual.
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        self.feed_forward = FEED_FORWARDS[config.pffn](config)
        self.attention = SelfAttention(config)
        self.literal = config.literal
        if not config.literal:
            self.feed_forward_norm = nn.LayerNorm(config.embed_dim)
            self.attention_norm = nn.LayerNorm(config.embed_dim)

    def forward(self, tokens: Tensor, x_sum: Tensor, offsets: Tensor, rope: Rope) -> Tensor:
        if self.literal:
            return self.attention(self.feed_forward(tokens, x_sum, offsets), offsets, rope)
        tokens = tokens + self.feed_forward(self.feed_forward_norm(tokens), x_sum, offsets)
        return tokens + self.attention(self.attention_norm(tokens), offsets, rope)
