"""Peers of candidates that share a request's keys: request by request, requests in groups, and copies of the keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from interformer_bench.peers import buckets
from torch import Tensor

from interformer_kernels import gated_cross_attention


class Requests(NamedTuple):
    """Requests of equally many candidates, in order.

    Attributes:
        q: `[R * C, N, H, D]`, of `C` candidates of each of `R` requests.
        k, v: `[T, H, D]`.
        offsets: `[R+1]`.
        rows: `[R * C]`: the request of each candidate.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    offsets: Tensor
    rows: Tensor

    @property
    def by_request(self) -> Tensor:
        """Queries of all candidates of each request, `[R, C * N, H, D]`."""
        return self.q.reshape(len(self.offsets) - 1, -1, *self.q.shape[2:])


def ours(x: Requests) -> Tensor:
    """The package's call."""
    out = gated_cross_attention(x.q, x.k, x.v, x.offsets, kv_rows=x.rows)
    assert isinstance(out, Tensor)
    return out


def by_request(x: Requests) -> Tensor:
    """One call of SDPA for each request, on its keys as they lie."""
    outs = []
    for q, start, end in zip(x.by_request, x.offsets.tolist(), x.offsets[1:].tolist(), strict=False):
        parts = (part.transpose(0, 1)[None] for part in (q, x.k[start:end], x.v[start:end]))
        outs.append(F.scaled_dot_product_attention(*parts)[0].transpose(0, 1))
    return torch.cat(outs).view_as(x.q)


def in_groups(x: Requests) -> Tensor:
    """One call of SDPA for each group of requests of similar length, padded to the longest."""
    groups = buckets.Groups(x.offsets, len(x.k), buckets.by_chunks)
    keys, values = (groups.pad(part) for part in (x.k, x.v))
    queries = x.by_request[groups.rows[: len(groups.rows) - groups.empty]].split([count for count, _ in groups.shapes])
    outs = [
        F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
        for q, k, v, mask in zip(queries, keys, values, groups.masks, strict=True)
    ]
    outs.append(x.by_request.new_zeros(groups.empty, *x.by_request.shape[1:]))
    return torch.cat(outs)[groups.rows.argsort()].view_as(x.q)


def copied_keys(x: Requests) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of each candidate, and their offsets."""
    lengths = x.offsets.diff()[x.rows]
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    row = torch.repeat_interleave(lengths)
    token = torch.arange(len(row)) - offsets[row] + x.offsets[x.rows][row]
    return x.k[token], x.v[token], offsets


def gathered_ours(x: Requests) -> Tensor:
    """The package's call without `kv_rows`, on a copy of the keys for each candidate."""
    k, v, offsets = copied_keys(x)
    out = gated_cross_attention(x.q, k, v, offsets)
    assert isinstance(out, Tensor)
    return out


def gathered_sdpa(x: Requests) -> Tensor:
    """SDPA on a copy of the keys for each candidate, those of similar length together."""
    k, v, offsets = copied_keys(x)
    groups = buckets.Groups(offsets, len(k), buckets.by_chunks)
    outs = []
    queries = x.q[groups.rows[: len(groups.rows) - groups.empty]].split([count for count, _ in groups.shapes])
    for q, key, value, mask in zip(queries, groups.pad(k), groups.pad(v), groups.masks, strict=True):
        parts = (part.transpose(1, 2) for part in (q, key, value))
        outs.append(F.scaled_dot_product_attention(*parts, mask).transpose(1, 2))
    outs.append(x.q.new_zeros(groups.empty, *x.q.shape[1:]))
    return torch.cat(outs)[groups.rows.argsort()]
