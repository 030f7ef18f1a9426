"""Rows grouped by length, each group padded to its own longest row: a call of PyTorch for each group.

Tokens are gathered into all groups by one index, and back by another. A group whose rows are equally long needs no
mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from interformer_bench.peers.padded import PaddedAttention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

# The rows of each group, as indices, by lengths in descending order.
Grouping = Callable[[Sequence[int]], list[list[int]]]
# Rows share a sorted chunk while the longest is at most so many times as long as the shortest.
_SIMILAR = 1.25
# The largest multiple of its own length that each grouping pads a row to.
BUCKET_WIDTH, CHUNK_WIDTH = 2.0, _SIMILAR


def by_powers(lengths: Sequence[int]) -> list[list[int]]:
    """Buckets whose edges are powers of two."""
    return _grouped(lengths, lambda longest, length: (longest - 1).bit_length() == (length - 1).bit_length())


def by_chunks(lengths: Sequence[int]) -> list[list[int]]:
    """Chunks of similar length, of the rows sorted by length."""
    return _grouped(lengths, lambda longest, length: longest <= _SIMILAR * length)


def _grouped(lengths: Sequence[int], together: Callable[[int, int], bool]) -> list[list[int]]:
    """Rows with tokens, the longest first; a row joins the last group where it goes together with its longest row."""
    groups: list[list[int]] = []
    for row in sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row]):
        if groups and together(lengths[groups[-1][0]], lengths[row]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class Groups:
    """The places of a jagged batch's tokens in its groups, which lie one after another.

    Attributes:
        rows: the rows in the order of the groups; rows without tokens follow, in no group.
        masks: for each group `[rows, 1, 1, width]`, True at a token; None where no row is padded.
    """

    def __init__(self, offsets: Tensor, tokens: int, grouping: Grouping) -> None:
        lengths = offsets.diff()
        as_list = lengths.tolist()
        groups = grouping(as_list)
        self.shapes = [(len(group), as_list[group[0]]) for group in groups]
        grouped = [row for group in groups for row in group]
        empty = [row for row, length in enumerate(as_list) if not length]
        self.empty = len(empty)
        self.rows = torch.tensor([*grouped, *empty], device=offsets.device)
        starts, sizes = offsets[self.rows], lengths[self.rows]
        sources, valid, first = [], [], 0
        self.masks: list[Tensor | None] = []
        for count, width in self.shapes:
            places = torch.arange(width, device=offsets.device)
            mask = places < sizes[first : first + count, None]
            # Padding reads an arbitrary token: it is masked, or not read back.
            sources.append((starts[first : first + count, None] + places).clamp(max=tokens - 1).flatten())
            valid.append(mask.flatten())
            full = as_list[grouped[first + count - 1]] == width
            self.masks.append(None if full else mask[:, None, None])
            first += count
        self.source = torch.cat(sources) if sources else self.rows.new_empty(0)
        self.back = self.rows.new_zeros(tokens)
        if valid:
            kept = torch.cat(valid).nonzero().flatten()
            self.back[self.source[kept]] = kept

    def pad(self, x: Tensor) -> list[Tensor]:
        """Convert `[T, ...]` to each group's `[rows, width, ...]`."""
        parts = x.index_select(0, self.source).split([count * width for count, width in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def unpad(self, parts: Sequence[Tensor]) -> Tensor:
        """Convert each group's `[rows, width, ...]` to `[T, ...]`."""
        return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, self.back)

    def of_rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split `[B, ...]` into each group's rows, and those in no group."""
        return x.index_select(0, self.rows).split([*(count for count, _ in self.shapes), self.empty])

    def to_rows(self, parts: Sequence[Tensor]) -> Tensor:
        """Put the groups' rows, and those in no group, back in the batch's order."""
        order = torch.empty_like(self.rows)
        order[self.rows] = torch.arange(len(self.rows), device=order.device)
        return torch.cat(list(parts)).index_select(0, order)


def sdpa_in_group(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """PyTorch's own attention, without a mask where no row is padded."""
    return sdpa(q, k, v, attn_mask=mask, scale=scale)


def attend_jagged(
    attention: PaddedAttention, grouping: Grouping, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float
) -> Tensor:
    """Attention inside rows, group by group."""
    groups = Groups(offsets, len(k), grouping)
    padded = [[part.transpose(1, 2) for part in groups.pad(x)] for x in (q, k, v)]
    outs = [attention(*qkv, mask, scale) for *qkv, mask in zip(*padded, groups.masks, strict=True)]
    return groups.unpad([out.transpose(1, 2) for out in outs])


def attend_dense(
    attention: PaddedAttention, grouping: Grouping, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float
) -> Tensor:
    """Queries `[B, N, H, D]` over packed keys, group by group; rows without keys get zeros."""
    groups = Groups(offsets, len(k), grouping)
    *queries, without_keys = groups.of_rows(q)
    keys, values = ([part.transpose(1, 2) for part in groups.pad(x)] for x in (k, v))
    outs = [
        attention(q_group.transpose(1, 2), k_group, v_group, mask, scale).transpose(1, 2)
        for q_group, k_group, v_group, mask in zip(queries, keys, values, groups.masks, strict=True)
    ]
    return groups.to_rows([*outs, torch.zeros_like(without_keys)])


def ffn(grouping: Grouping, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
    """One batched product for each group."""
    groups = Groups(offsets, len(x), grouping)
    *weights, _ = groups.of_rows(weight)
    *biases, _ = groups.of_rows(bias[:, None])
    products = zip(biases, groups.pad(x), weights, strict=True)
    return groups.unpad([torch.baddbmm(*product) for product in products])
