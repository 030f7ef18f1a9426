"""Attention on a GPU as the ops' peers have it: what a user would take there, with the longest length known.

All but one are given the longest length, since users know it; reading it from the device would synchronise and prevent
capture in a graph. Where all rows are equally long no mask is needed, and PyTorch's attention is restricted to its
flash kernel, and to cuDNN's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from interformer_bench.peers import nested, padded, varlen
from interformer_bench.peers.cores import AttentionCore
from interformer_bench.peers.peer import Peer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

# Peers for rows that are all equally long, and the SDPA backend of each.
FULL = {"SDPA flash, full rows": "FLASH_ATTENTION", "SDPA cuDNN, full rows": "CUDNN_ATTENTION"}


def gpu_cores(lengths: Sequence[int], packed: bool) -> dict[str, Peer]:
    """Attention with packed queries, or with a row's dense queries, as peers whose `run` is an `AttentionCore`."""
    longest, shortest = max(lengths, default=0), min(lengths, default=0)
    layout = "jagged" if packed else "dense"
    pad, flat, nest = (getattr(module, f"attend_{layout}") for module in (padded, varlen, nested))
    tokens = 5 if packed else 4

    def padding(attention: padded.PaddedAttention) -> AttentionCore:
        return lambda q, k, v, offsets, scale: pad(attention, q, k, v, offsets, longest, scale)

    full = {}
    if lengths and longest == shortest > 0:
        full = {name: Peer(_full(kind, longest, packed), empty_rows=False) for name, kind in FULL.items()}
    return {
        **full,
        "varlen_attn, longest known": Peer(functools.partial(flat, longest=longest)),
        "varlen_attn": Peer(flat),
        "padded SDPA": Peer(padding(padded.sdpa_with_mask), tokens=tokens),
        # Nested kernels are given the shortest length. An empty row would change it, so they are checked without any.
        "nested SDPA": Peer(
            functools.partial(nest, bounds=(shortest, longest)), tokens=tokens, scores=1, empty_rows=shortest == 0
        ),
        "eager with mask": Peer(padding(padded.eager_with_mask), tokens=tokens, scores=3),
    }


def _full(kind: str, length: int, packed: bool) -> AttentionCore:
    """PyTorch's attention on rows of one length without a mask, by this kernel or an error."""

    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        rows = (x.unflatten(0, (-1, length)) for x in ((q, k, v) if packed else (k, v)))
        queries, keys, values = (x.transpose(1, 2) for x in (rows if packed else (q, *rows)))
        with sdpa_kernel(getattr(SDPBackend, kind)):
            out = sdpa(queries, keys, values, scale=scale).transpose(1, 2)
        return out.flatten(0, 1) if packed else out

    return run
