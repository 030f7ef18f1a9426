"""Modules that make the tables of attention's biases, by distance and by time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from interformer_kernels import _checks as checks


class RelativePositionBias(nn.Module):
    r"""A bias of attention scores by the distance of query and key: the table for ``position_bias``.

    ``jagged_attention(q, k, v, offsets, position_bias=bias())`` adds ``table[h, clamp(p - j, -P, P) + P]``.

    Args:
        num_heads: ``H``.
        max_distance: ``P``; farther keys share the entry at the end.
        kind: ``"distance"``: a parameter ``weight [H, 2 P + 1]`` for each distance, initially 0.
            ``"t5"``: a parameter ``weight [num_buckets, H]``, which is T5's ``relative_attention_bias.weight``; buckets
            are single distances first, and then grow with the logarithm up to ``max_distance``.
            ``"alibi"``: no parameter; ``-slope_h * |p - j|`` with ``slope_h = 2^(-8 (h + 1) / H)`` where ``H`` is a
            power of two, and the published interleaving where it is not. ``P`` must be as long as the longest row.
        num_buckets: buckets of ``"t5"``.
        bidirectional: whether keys behind the query have entries of their own; ``weight`` of ``"distance"`` is
            ``[H, P + 1]`` without. False is for causal attention: there a key behind the query can only be a target
            that meets itself, whose distance is then 0, whatever its place among the targets.
        device: of the parameter.

    The table is float32; give double precision calls ``bias().double()``.

    Source: Shaw et al., 2018; Raffel et al., 2020 (T5), section 2.1; Press et al., 2022 (ALiBi), section 3.
    """

    KINDS = ("distance", "t5", "alibi")
    index: Tensor
    slopes: Tensor
    weight: nn.Parameter | None

    def __init__(
        self,
        num_heads: int,
        max_distance: int = 128,
        kind: str = "distance",
        *,
        num_buckets: int = 32,
        bidirectional: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.num_heads = checks.check_count(name, "num_heads", num_heads, least=1)
        self.max_distance = checks.check_count(name, "max_distance", max_distance, least=1)
        checks.check_choice(name, "kind", kind, self.KINDS)
        both = checks.check_bool(name, "bidirectional", bidirectional)
        self.kind, distances = kind, torch.arange(-max_distance, max_distance + 1)
        entries = 2 * max_distance + 1 if both else max_distance + 1
        shape = {"distance": (num_heads, entries), "t5": (num_buckets, num_heads), "alibi": None}[kind]
        self.weight = None if shape is None else nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
        if kind == "t5":
            checks.check_count(name, "num_buckets", num_buckets, least=4 if both else 2)
            index = t5_buckets(distances, num_buckets, max_distance, bidirectional)
            self.register_buffer("index", index.to(device), persistent=False)
        if kind == "alibi":
            table = -alibi_slopes(num_heads)[:, None] * (distances.abs() if both else distances.clamp(min=0))
            self.register_buffer("slopes", table.float().to(device), persistent=False)

    def forward(self) -> Tensor:
        """The table ``[H, 2 P + 1]``, differentiable."""
        if self.weight is None:
            return self.slopes
        if self.kind == "t5":
            return self.weight[self.index].T.contiguous()
        missing = 2 * self.max_distance + 1 - self.weight.shape[1]
        return torch.cat((self.weight[:, :1].expand(-1, missing), self.weight), 1) if missing else self.weight

    def extra_repr(self) -> str:
        """The sizes shown by the module's `repr`."""
        return f"{self.num_heads}, max_distance={self.max_distance}, kind={self.kind!r}"


def t5_buckets(distances: Tensor, num_buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """T5's bucket of each distance `p - j`: positive ones are of keys before the query."""
    bucket = torch.zeros_like(distances)
    if bidirectional:
        num_buckets //= 2
        bucket = (distances < 0) * num_buckets
        distances = distances.abs()
    distances = distances.clamp(min=0)
    exact = num_buckets // 2
    # As in T5, the logarithm is a float32's: single distances at the edges of buckets depend on its rounding.
    grown = torch.log(distances.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    far = (exact + grown.clamp(min=0).long()).clamp(max=num_buckets - 1)
    return bucket + torch.where(distances < exact, distances, far)


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes: a geometric sequence, and every second of the next longer one where heads are no power of two."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    second = [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * (heads - power), 2)]
    return torch.tensor(first + second, dtype=torch.float64)


class TimeBias(nn.Module):
    r"""A bias of attention scores by the time between query and key: the arguments ``time_bias`` and ``time_edges``.

    ``jagged_attention(q, k, v, offsets, times=times, **bias())`` adds ``weight[h, n]`` where ``n`` of the edges are at
    most ``|t_i - t_j|``.

    Args:
        num_heads: ``H``; 1 is one table for all heads.
        edges: ascending whole numbers, in the unit of the times; None are those of ``num_buckets`` buckets whose widths
            grow with the logarithm, HSTU's: bucket ``n`` begins at ``exp(0.301 n)``, rounded up.
        num_buckets: buckets without ``edges``.
        device: of the parameter.

    ``weight [H, N]`` is float32, initially 0.

    Source: HSTU (Zhai et al., 2024), ``RelativeBucketedTimeAndPositionBasedBias`` of its implementation.
    """

    edges: Tensor

    def __init__(
        self,
        num_heads: int,
        edges: list[int] | Tensor | None = None,
        *,
        num_buckets: int = 64,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.num_heads = checks.check_count(name, "num_heads", num_heads, least=1)
        if edges is None:
            checks.check_count(name, "num_buckets", num_buckets, least=1, most=140)
            edges = [math.ceil(math.exp(0.301 * n)) for n in range(1, num_buckets)]
        table = torch.as_tensor(edges, dtype=torch.int64, device=device).clone()
        if table.dim() != 1 or bool((table.diff() < 0).any()):
            raise ValueError(f"{name}: edges must be ascending whole numbers along one axis, found {edges}")
        self.register_buffer("edges", table)
        self.weight = nn.Parameter(torch.zeros(num_heads, len(table) + 1, dtype=torch.float32, device=device))

    def forward(self) -> dict[str, Tensor]:
        """The keyword arguments ``time_bias [H, N]`` and ``time_edges [N-1]``."""
        return {"time_bias": self.weight, "time_edges": self.edges}

    def extra_repr(self) -> str:
        """The sizes shown by the module's `repr`."""
        return f"{self.num_heads}, buckets={self.weight.shape[1]}"
