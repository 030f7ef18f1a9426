"""Rotary embedding of packed tokens in plain PyTorch: with tables gathered by position, or shared by padded rows."""

from __future__ import annotations

import torch
from interformer_bench.peers.padded import Padding, longest
from torch import Tensor

Tables = tuple[Tensor, Tensor]


def _positions(offsets: Tensor, tokens: int) -> Tensor:
    """The position of every token in its row."""
    starts = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=tokens)
    return torch.arange(tokens, device=offsets.device) - starts


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs `(c, c + R/2)` of the last axis, of size `R`, in the tables' precision."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def halves(x: Tensor, offsets: Tensor, rope: Tables) -> Tensor:
    """The formula, with tables that are gathered for every token."""
    positions = _positions(offsets, len(x))
    return _rotated(x, *(table[positions][:, None] for table in rope))


def rotate_half(x: Tensor, offsets: Tensor, rope: Tables) -> Tensor:
    """The form of Hugging Face's models: tables as wide as a head and in its dtype, `x cos + rotate_half(x) sin`."""
    positions = _positions(offsets, len(x))
    cos, sin = (torch.cat((table, table), dim=-1).to(x.dtype)[positions][:, None] for table in rope)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def padded(x: Tensor, offsets: Tensor, rope: Tables, width: int | None = None) -> Tensor:
    """Pad, rotate all rows by the same slice of the tables, unpad; `width` is the longest length, where it is known."""
    width = longest(offsets) if width is None else width
    padding = Padding(offsets, width, len(x))
    return padding.unpad(_rotated(padding.pad(x), *(table[:width, None] for table in rope)))


def by_rows(x: Tensor, offsets: Tensor, rope: Tables) -> Tensor:
    """Row by row, concatenated."""
    rows = x.split(offsets.diff().tolist())
    return torch.cat([_rotated(row, *(table[: len(row), None] for table in rope)) for row in rows])
