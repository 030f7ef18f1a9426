"""The Sequence Arch (docs/interformer.md, section 5): attention inside each row after a personalised feed-forward.

Axes: `T` tokens of all rows in the jagged layout (CLS tokens in front of each row), `E` model width, `H` heads of
`D = E / H`, `S` CLS tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from interformer.config import InterFormerConfig
from interformer.feed_forward import FEED_FORWARDS
from interformer.layers import Rope
from interformer_kernels import jagged_attention
from interformer_kernels.ops.slices import unbind_slices


class SelfAttention(nn.Module):
    """Equation 9: multi-head attention inside each row, softmax, both directions; `tokens [T, E] -> [T, E]`.

    Rotary embedding is applied if tables are given; a token's position is its index in the row, CLS tokens first.
    `W_Q, W_K, W_V` are one matrix; neither it nor `W_O` has a bias. Under `config.window = (left, right)` a token sees
    that many neighbours and the first `num_prefix` tokens of its row, which see the whole row.
    """

    def __init__(self, config: InterFormerConfig, num_prefix: int) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads, self.backend = config.num_heads, config.backend
        self.window = config.window or (-1, -1)
        self.num_prefix = num_prefix if config.window else 0
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor, offsets: Tensor, rope: Rope | None = None) -> Tensor:
        q, k, v = unbind_slices(self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)))  # [T, H, D] each
        attn_out = jagged_attention(
            q, k, v, offsets, window=self.window, num_prefix=self.num_prefix, rope=rope, backend=self.backend
        )
        assert isinstance(attn_out, Tensor)
        return self.out(attn_out.flatten(-2))


class SequenceArch(nn.Module):
    """Equations 8 and 9: `S' = MHA(PFFN(X_sum, S))`, `tokens [T, E] -> [T, E]`; each half is optional.

    By default both halves are pre-norm with a residual; the literal form has neither norm nor residual.
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        self.literal = config.literal
        self.feed_forward = FEED_FORWARDS[config.pffn](config) if config.pffn != "none" else None
        self.attention = SelfAttention(config, config.cls_tokens) if config.attention else None
        self.feed_forward_norm = self._norm_before(self.feed_forward, config)
        self.attention_norm = self._norm_before(self.attention, config)

    @staticmethod
    def _norm_before(half: nn.Module | None, config: InterFormerConfig) -> nn.Module:
        return nn.Identity() if half is None or config.literal else nn.LayerNorm(config.embed_dim)

    def forward(self, tokens: Tensor, x_sum: Tensor | None, offsets: Tensor, rope: Rope) -> Tensor:
        if self.feed_forward is not None:
            ffn_out = self.feed_forward(self.feed_forward_norm(tokens), x_sum, offsets)
            tokens = ffn_out if self.literal else tokens + ffn_out
        if self.attention is not None:
            attn_out = self.attention(self.attention_norm(tokens), offsets, rope)
            tokens = attn_out if self.literal else tokens + attn_out
        return tokens
