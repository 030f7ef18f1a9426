"""Row by row: one call of PyTorch per row, on views of `split`, whose backward is one concatenation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

# Attention of one row: q, k, v `[1, H, L, D]` and scale.
RowAttention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def sdpa_of_row(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """PyTorch's own attention."""
    return sdpa(q, k, v, scale=scale)


def eager_of_row(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention in plain tensor operations, to be compiled."""
    return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v


def addmm_of_row(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The product of one row."""
    return torch.addmm(bias, x, weight)


def _rows(x: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """Split `[T, H, D]` into each row's `[1, H, L, D]`; with three axes, PyTorch would take a slower SDPA."""
    heads_first = x.transpose(0, 1)[None]
    return torch.split(heads_first, offsets.diff().tolist(), dim=2)


def attend_jagged(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, attention: RowAttention = sdpa_of_row
) -> Tensor:
    """One call per row, concatenated."""
    rows = zip(_rows(q, offsets), _rows(k, offsets), _rows(v, offsets), strict=True)
    outs = [attention(q_row, k_row, v_row, scale) for q_row, k_row, v_row in rows if q_row.shape[2]]
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, attention: RowAttention = sdpa_of_row
) -> Tensor:
    """One call per row of queries `[B, N, H, D]`; rows without keys get zeros."""
    rows = zip(q.transpose(1, 2).split(1), _rows(k, offsets), _rows(v, offsets), strict=True)
    outs = [
        attention(q_row, k_row, v_row, scale) if k_row.shape[2] else torch.zeros_like(q_row)
        for q_row, k_row, v_row in rows
    ]
    return torch.cat(outs).transpose(1, 2)


def folded(seeds: Tensor, x: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """Folded seeds `[M, H, E]` over the raw tokens of each row, as two matrix products."""
    queries = seeds.flatten(0, 1) * scale
    pooled = [(queries @ row.T).softmax(-1) @ row for row in x.split(offsets.diff().tolist())]
    return torch.stack(pooled).view(-1, *seeds.shape)


def ffn(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor, product: Callable[..., Tensor] = torch.addmm
) -> Tensor:
    """One product per row, concatenated."""
    rows = zip(bias.unbind(), x.split(offsets.diff().tolist()), weight.unbind(), strict=True)
    return torch.cat([product(*row) for row in rows])
