"""Layers used on both sides of InterFormer; sections refer to docs/interformer.md.

Axes: `n` non-sequence tokens, `T` tokens of all rows in the jagged layout, `E` model width, `k` fields of an event.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from interformer.config import InterFormerConfig

Rope = tuple[Tensor, Tensor]


class SharedTokens(NamedTuple):
    """Tokens of candidates, `[C, m, E]`, of which the last are those of their requests: `shared[rows]`.

    Attributes:
        own: `[C, m_c, E]`.
        shared: `[R, m_r, E]`.
        rows: `[C]`: the request of each candidate.
    """

    own: Tensor
    shared: Tensor
    rows: Tensor

    def take(self, of_requests: Tensor) -> Tensor:
        """Each candidate gets its request's part of `[R, ...]`: `[C, ...]`; the gradient is an ordered sum."""
        flat, dtype = of_requests.flatten(1), of_requests.dtype
        # Gradients of hundreds of candidates would be lost in a sum of 16 bits.
        wide = flat.float() if dtype.itemsize < 4 else flat
        return nn.functional.embedding(self.rows, wide).to(dtype).unflatten(1, of_requests.shape[1:])

    def all(self) -> Tensor:
        """All tokens of each candidate, `[C, m, E]`."""
        return torch.cat((self.own, self.take(self.shared)), 1)

    def linear(self, layer: nn.Linear, own: Tensor, shared: Tensor) -> Tensor:
        """`layer` of `[own | shared[rows]]`, for `own [C, a]` and `shared [R, b]`: requests are multiplied once."""
        of_own, of_shared = layer.weight.split((own.shape[1], shared.shape[1]), 1)
        of_requests = self.take(nn.functional.linear(shared, of_shared, layer.bias))
        return torch.addmm(of_requests, own, of_own.T)


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

    def behind_first(self, x: Tensor) -> Tensor:
        """All but the first layer, of the first one's output."""
        _, *layers = self
        for layer in layers:
            x = layer(x)
        return x

    @property
    def first(self) -> nn.Linear:
        """The input layer."""
        layer = self[0]
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def last(self) -> nn.Linear:
        """The output layer, which often is initialised differently."""
        layer = self[-1]
        assert isinstance(layer, nn.Linear)
        return layer


class MaskNet(nn.Module):
    """Section 1, equation 6: `S0 = lce(Sc * mask(Sc))`, `Sc [T, kE] -> S0 [T, E]`.

    `mask` is a two-layer MLP `kE -> kE -> kE`, followed by a sigmoid or not; or there is none.
    """

    def __init__(self, config: InterFormerConfig, num_sequences: int) -> None:
        super().__init__()
        width = num_sequences * config.embed_dim
        self.mask = MLP((width, width, width)) if config.mask_output != "none" else None
        self.sigmoid = config.mask_output == "sigmoid"
        self.lce = nn.Linear(width, config.embed_dim)
        if self.mask is not None:
            # Without a sigmoid, the mask starts at one, so that MaskNet starts as a linear map of the events.
            nn.init.constant_(self.mask.last.bias, 0.0 if self.sigmoid else 1.0)

    def forward(self, events: Tensor) -> Tensor:
        if self.mask is None:
            return self.lce(events)
        mask = self.mask(events)
        return self.lce(events * (torch.sigmoid(mask) if self.sigmoid else mask))


_SELF_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "self_identity": lambda z: z,
    "self_tanh": torch.tanh,
    "self_sigmoid": torch.sigmoid,
}


class Gating(nn.Module):
    """Section 2, equation 10: `sigma(Z * g(Z))`, or `Z * sigmoid(g(Z))` for `multiply_sigmoid`; `[..., E] -> [..., E]`.

    `g` is an MLP `E -> E -> E` on the feature axis, the same for all tokens. Its output starts near one, so that the
    gate starts as `sigma(Z)` rather than as a product of two small numbers. Mode `none` is the identity.
    """

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        self.mode = config.gate
        self.keeps_zeros = self.mode != "self_sigmoid"  # whether a token of zeros stays one
        if self.mode != "none":
            self.g = MLP((config.embed_dim,) * 3)
            nn.init.ones_(self.g.last.bias)

    def forward(self, z: Tensor) -> Tensor:
        if self.mode == "none":
            return z
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

    def shared(self, z: SharedTokens) -> Tensor:
        """The same of tokens of which some are shared."""
        own, shared = self.weight.split((z.own.shape[1], z.shared.shape[1]), 1)
        return own @ z.own + z.take(shared @ z.shared)


class RotaryTables(nn.Module):
    """Tables `cos, sin [P, D/2]` of the rotary embedding (section 5) for positions `0 .. P-1`, always float32.

    When the model changes its dtype they are recomputed, not cast. They are not part of the state dict.
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
