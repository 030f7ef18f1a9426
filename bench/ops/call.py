"""The arguments of a call and its sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Inputs = Mapping[str, Any]
# An op, called with its keyword arguments.
OpFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call apart from its rows.

    Attributes:
        heads: query heads, and as many key/value heads.
        head_size: of queries, keys and values; the width `E` of `personalized_ffn`. `apply_rotary` rotates all of it.
        queries: number of seeds, or of a row's dense queries.
        width: width of the tokens before projection (`pma_folded`); the width `F` of `personalized_ffn`.
        gated: with a gate and a residual of the output's shape (`gated_cross_attention`).
    """

    heads: int = 1
    head_size: int = 16
    queries: int = 1
    width: int = 0
    gated: bool = False

    def __str__(self) -> str:
        parts = [f"H{self.heads}", f"D{self.head_size}", f"M{self.queries}"]
        if self.width:
            parts.append(f"E{self.width}")
        return " ".join([*parts, *(["gated"] if self.gated else [])])


def key_offsets(arguments: Inputs) -> Tensor:
    """The offsets of the keys, whichever name the op has for them."""
    offsets = arguments["kv_offsets"] if "kv_offsets" in arguments else arguments["offsets"]
    assert isinstance(offsets, Tensor)
    return offsets
