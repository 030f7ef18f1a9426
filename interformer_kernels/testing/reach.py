"""The numbers of a call that may depend on one place of an input: the contract of values that are not finite.

A query's own number reaches that query's output, and in the backward its own gradient and those of the keys and values
of its row under its key/value head. A key or value reaches the queries of its row under the heads that read it. Sums
over rows or tokens (gradients of seeds and of gates that broadcast) are reached by what they sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

Reach = dict[str, Tensor]  # by quantity (`out`, `lse`, `dq`, ...)


def rows_of(offsets: Tensor, tokens: int, skip: int = 0) -> Tensor:
    """Row of each token; -1 on the tail and on the first `skip` of a row."""
    token = torch.arange(tokens, device=offsets.device)
    row = torch.searchsorted(offsets[1:].long().contiguous(), token, right=True)
    held = (token < offsets[-1]) & (token - offsets.long()[row] >= skip)
    return row.where(held, -1)


def at(x: Tensor, place: tuple[int, ...]) -> Tensor:
    """True at one place of a tensor like `x`."""
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[place] = True
    return mask


def gathered(mask: Tensor, like: Tensor) -> Tensor:
    """A mask over the output, gathered into the shape of what broadcasts to it."""
    shape = (1,) * (mask.dim() - like.dim()) + tuple(like.shape)
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    for axis in axes:
        mask = mask.any(axis, keepdim=True)
    return mask.view(like.shape)
