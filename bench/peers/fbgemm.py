"""FBGEMM's jagged operations on the CPU (`pip install fbgemm-gpu-cpu`), listed where that library is installed.

It is imported by the first call, since that takes seconds; where it was built for another torch, the peer fails.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from interformer_bench.peers.padded import longest, sdpa_with_mask
from torch import Tensor


def installed() -> bool:
    """Whether the library is there."""
    return importlib.util.find_spec("fbgemm_gpu") is not None


@functools.cache
def _ops() -> Any:
    importlib.import_module("fbgemm_gpu")
    return torch.ops.fbgemm


def attend_jagged(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """SDPA between FBGEMM's padding and unpadding."""
    ops, width, shape = _ops(), longest(offsets), (q.shape[1], q.shape[2])

    def pad(x: Tensor) -> Tensor:
        dense: Tensor = ops.jagged_to_padded_dense(x.flatten(1), [offsets], [width], 0.0)
        return dense.unflatten(2, shape).transpose(1, 2)

    mask = torch.arange(width, device=q.device) < offsets.diff()[:, None]
    out = sdpa_with_mask(pad(q), pad(k), pad(v), mask[:, None, None], scale)
    packed: Tensor = ops.dense_to_jagged(out.transpose(1, 2).flatten(2), [offsets], len(q))[0]
    return packed.unflatten(1, shape)


def attend_dense(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """Queries `[B, N, H, D]`: jagged products and a jagged softmax, head by head."""
    ops, width = _ops(), longest(offsets)
    queries = (q * scale).permute(2, 0, 3, 1)  # [H, B, D, N]
    outs = []
    for head in range(q.shape[2]):
        scores, _ = ops.jagged_dense_bmm(k[:, head], offsets, queries[head], width)
        weights, _ = ops.jagged_softmax(scores, offsets, width)
        outs.append(ops.jagged_jagged_bmm(weights, v[:, head], offsets, width))
    return torch.stack(outs, dim=2)


def ffn(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
    """One jagged product; the bias of each token's row is gathered."""
    out: Tensor = _ops().jagged_dense_bmm(x, offsets, weight, longest(offsets))[0]
    row = torch.repeat_interleave(torch.arange(len(bias), device=x.device), offsets.diff(), output_size=len(x))
    return out + bias.index_select(0, row)
