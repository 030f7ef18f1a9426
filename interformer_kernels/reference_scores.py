"""Masks, biases and dropout of attention, for the reference: docs/ops.md in eager PyTorch.

Axes: `B` rows, `N` queries and `L` keys of a row (padded), `H` query heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Masks(NamedTuple):
    """Masks by position, the same for all rows: see `visible_keys`."""

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    num_prefix: int = 0
    prefix: str = "full"
    full_tail: int = 0


class Sizes(NamedTuple):
    """Tokens of rows, each `[B]`: of the queries, of the keys, and targets among both (None: there are none)."""

    queries: Tensor
    keys: Tensor
    targets: Tensor | None = None


class Places(NamedTuple):
    """Queries and keys of padded rows: where query `i` stands, `p [B, N, 1]`; whether it is a target; the targets of
    each row `[B, 1, 1]`; and the indices `i [N, 1]` and `j [L]`."""

    p: Tensor
    is_target: Tensor
    targets: Tensor
    i: Tensor
    j: Tensor


def places(rows: Sizes, size: tuple[int, int]) -> Places:
    """Query `i` stands at `p = i + (keys - queries)`, so that the last query stands at the last key; a target behind
    the last key that is none."""
    device = rows.queries.device
    i = torch.arange(size[0], device=device)[:, None]
    j = torch.arange(size[1], device=device)
    queries, keys = rows.queries[:, None, None], rows.keys[:, None, None]
    targets = torch.zeros_like(keys)
    if rows.targets is not None:
        most = torch.minimum(queries, keys)
        targets = torch.minimum(rows.targets.long()[:, None, None].clamp(min=0), most)
    is_target = i >= queries - targets
    return Places((i + keys - queries).where(~is_target, keys - targets), is_target, targets, i, j)


def visible_keys(rows: Sizes, size: tuple[int, int], masks: Masks) -> Tensor:
    """The keys that each query sees, `[B, N, L]`, of rows that are padded to `size` queries and keys."""
    at = places(rows, size)
    queries, keys, (left, right), n = (
        rows.queries[:, None, None],
        rows.keys[:, None, None],
        masks.window,
        masks.num_prefix,
    )
    p, j = at.p, at.j
    if masks.prefix == "index":  # the prefix is one place
        p, j = (p - n + 1).clamp(min=0), (j - n + 1).clamp(min=0)
    seen = torch.ones_like(p + j, dtype=torch.bool)
    if left >= 0:
        seen &= j >= p - left
    if right >= 0:
        seen &= j <= p + right
    if masks.full_tail > 0:
        seen |= at.i >= queries - at.targets - masks.full_tail
    if masks.prefix == "keys":
        seen |= at.j < n
    if masks.causal:
        seen &= j <= p
    if masks.prefix == "full":
        seen |= (at.j < n) | ((at.i < n) & ~at.is_target)
    if masks.prefix == "index":
        seen |= (at.p < n) & ~at.is_target
    seen &= at.j < keys - at.targets
    seen |= at.is_target & (at.j == at.i + keys - queries)
    return seen & (at.i < queries) & (at.j < keys)


def position_bias(table: Tensor, p: Tensor, keys: int) -> Tensor:
    """`table[h, clamp(p - j, -P, P) + P]` of `table [Hb, 2 P + 1]` for queries at `p [B, N, 1]`: `[B, N, Hb, L]`."""
    most = table.shape[1] // 2
    distance = (p - torch.arange(keys, device=p.device)).clamp(-most, most) + most
    return table[:, distance].permute(1, 2, 0, 3)


def time_bias(table: Tensor, times_q: Tensor, times_k: Tensor, edges: Tensor) -> Tensor:
    """`table[h, #{e : edges[e] <= |t_i - t_j|}]` for `times_q [B, N]` and `times_k [B, L]`: `[B, N, Hb, L]`."""
    apart = (times_q[:, :, None] - times_k[:, None, :]).abs()
    return table[:, torch.searchsorted(edges.contiguous(), apart, right=True)].permute(1, 2, 0, 3)


# ---------------------------------------------------------------- dropout

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 7


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 of 7 rounds (Salmon et al., 2011): four random words, as int64, of each counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        (high0, low0), (high1, low1) = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _product(x: Any, factor: int) -> tuple[Any, Any]:
    """The high and the low word of a product of two words, in numbers of 63 bits."""
    low_half = (x & 0xFFFF) * factor
    return ((x >> 16) * factor + (low_half >> 16)) >> 16, (((x >> 16 & 0xFFFF) * factor << 16) + low_half) & _WORD


class Dropout(NamedTuple):
    """Dropout of the weights of rows: its probability, and its seed (None where that leaves nothing to chance)."""

    p: float
    seed: Tensor | None

    def factors(self, queries: Tensor, keys: Tensor, heads: int) -> Tensor:
        """`1 / (1 - p)` for weights that are kept and 0 for others, float64 `[B, N, H, L]`: of queries with the
        numbers `queries [B, N]`, and of keys at `keys [L]` of their rows."""
        shape = (*queries.shape, heads, len(keys))
        if self.seed is None:
            return torch.full(shape, float(self.p == 0), dtype=torch.float64, device=queries.device)
        n = queries[:, :, None, None]
        head = torch.arange(heads, device=queries.device)[:, None]
        seed = self.seed.reshape(())
        counter = (keys // 4, head, n & _WORD, n >> 32 & _WORD)
        words = torch.stack(torch.broadcast_tensors(*philox(counter, (seed & _WORD, seed >> 32 & _WORD))), -1)
        word = words.gather(-1, (keys % 4).expand(shape)[..., None]).squeeze(-1)
        return (word >= int(self.p * 2.0**32)).double() / (1 - self.p)
