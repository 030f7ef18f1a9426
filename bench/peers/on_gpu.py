"""The peers on a GPU: what a user would take there, with the longest length known.

All but one are given the longest length, since users know it; reading it from the device would synchronise and prevent
capture in a graph. Where all rows are equally long no mask is needed, and PyTorch's attention is restricted to its
flash kernel, and to cuDNN's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from interformer_bench.peers import nested, padded, rotary, varlen
from interformer_bench.peers.registry import (
    PADDED_BMM,
    AttentionCore,
    Peer,
    as_gated,
    as_jagged,
    as_pooling,
    peers_of,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

# Peers for rows that are all equally long, and the SDPA backend of each.
FULL = {"SDPA flash, full rows": "FLASH_ATTENTION", "SDPA cuDNN, full rows": "CUDNN_ATTENTION"}
_COMPILED = ("torch.compile", "FlexAttention")


def gpu_peers(op: str, lengths: Sequence[int], compile_them: bool = False) -> dict[str, Peer]:
    """The peers of `op` on rows of these lengths, by name; with `compile_them`, only those `torch.compile` makes."""
    if compile_them:
        return {name: peer for name, peer in peers_of(op).items() if name in _COMPILED}
    if op == "apply_rotary":
        return _rotary(max(lengths, default=0))
    if op == "personalized_ffn":
        return _ffn(max(lengths, default=0))
    cores = _cores(lengths, packed=op == "jagged_attention")
    adapt = {"jagged_attention": as_jagged, "pma_pooling": as_pooling, "gated_cross_attention": as_gated}[op]
    peers = {name: replace(peer, run=adapt(peer.run)) for name, peer in cores.items()}
    by_sums = {"index-add": peers_of(op)["index-add"]} if op == "pma_pooling" else {}
    return {**peers, **by_sums}


def _cores(lengths: Sequence[int], packed: bool) -> dict[str, Peer]:
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


def _rotary(longest: int) -> dict[str, Peer]:
    padded_rotary = functools.partial(rotary.padded, width=longest)
    return {
        "two halves": Peer(rotary.halves),
        "rotate_half": Peer(rotary.rotate_half),
        "padded": Peer(padded_rotary, tokens=3),
    }


def _ffn(longest: int) -> dict[str, Peer]:
    def padded_bmm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
        return padded.ffn(x, weight, offsets, bias, longest)

    return {"padded bmm": Peer(padded_bmm, group=PADDED_BMM, tokens=2)}
