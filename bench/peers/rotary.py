"""Rotary embedding of packed tokens in plain PyTorch: tables gathered by position, or rows that share them."""

from __future__ import annotations

import torch
from interformer_bench.peers.padded import Padding, longest
from torch import Tensor

Tables = tuple[Tensor, Tensor]


def _positions(offsets: Tensor, tokens: int) -> Tensor:
    """The index of every token in its row."""
    starts = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=tokens)
    return torch.arange(tokens, device=offsets.device) - starts


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs `(c, c + R/2)` of the last axis turned, in the tables' precision; `R` is its whole size."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def halves(x: Tensor, offsets: Tensor, rope: Tables) -> Tensor:
    """The formula, on tables that are gathered for every token."""
    at = _positions(offsets, len(x))
    return _turned(x, *(table[at][:, None] for table in rope))


def rotate_half(x: Tensor, offsets: Tensor, rope: Tables) -> Tensor:
    """As Hugging Face's models write it: tables as wide as a head and in its dtype, `x cos + rotate_half(x) sin`."""
    at = _positions(offsets, len(x))
    cos, sin = (torch.cat((table, table), dim=-1).to(x.dtype)[at][:, None] for table in rope)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def padded(x: Tensor, offsets: Tensor, rope: Tables, width: int | None = None) -> Tensor:
    """Pad, turn all rows by the same slice of the tables, unpad; `width`: the longest length, where it is known."""
    width = longest(offsets) if width is None else width
    padding = Padding(offsets, width, len(x))
    return padding.unpad(_turned(padding.pad(x), *(table[:width, None] for table in rope)))


def by_rows(x: Tensor, offsets: Tensor, rope: Tables) -> Tensor:
    """Row by row, joined."""
    rows = x.split(offsets.diff().tolist())
    return torch.cat([_turned(row, *(table[: len(row), None] for table in rope)) for row in rows])
