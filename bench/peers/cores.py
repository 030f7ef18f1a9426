"""Attention as the ops' peers have it: cores of queries, keys and values, and their adapters to the ops' arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from interformer_bench.ops.call import OpFunction
from interformer_bench.peers import buckets, compiled, fbgemm, nested, padded, rows, varlen
from interformer_bench.peers.peer import Peer
from torch import Tensor, cuda

# Attention of queries to packed keys and values: q, k, v, offsets and scale to the output.
AttentionCore = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


# ---------------------------------------------------------------- from a core to the op's arguments


def default_scale(q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5)


def as_jagged(core: AttentionCore) -> OpFunction:
    return lambda q, k, v, offsets: core(q, k, v, offsets, default_scale(q))


def as_gated(core: AttentionCore) -> OpFunction:
    """Dense queries, with gate and residual where the call has them."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, kv_offsets: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        out = core(q, k, v, kv_offsets, default_scale(q))
        out = out if gate is None else out * gate.sigmoid()
        return out if residual is None else residual + out

    return run


def as_pooling(core: AttentionCore) -> OpFunction:
    """Dense queries that are equal in every row."""
    return lambda seeds, k, v, offsets: core(
        seeds.expand(len(offsets) - 1, *seeds.shape), k, v, offsets, default_scale(seeds)
    )


# ---------------------------------------------------------------- cores on the CPU


def core_with_width(core: Callable[..., Tensor], attention: padded.PaddedAttention, multiple: int = 1) -> AttentionCore:
    """A core over padded tensors that are as wide as the longest row, rounded up to a multiple of `multiple`."""
    return lambda q, k, v, offsets, scale: core(attention, q, k, v, offsets, padded.longest(offsets, multiple), scale)


def compiled_core(core: Callable[..., Tensor]) -> AttentionCore:
    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
        width = padded.longest(offsets)
        out: Tensor = compiled.compiled(core)(padded.eager_with_mask, q, k, v, offsets, width, scale)
        return out

    return run


def compiled_by_row(core: Callable[..., Tensor]) -> AttentionCore:
    """A core over rows, with each row's attention compiled for any length."""
    return lambda q, k, v, offsets, scale: core(q, k, v, offsets, scale, compiled.compiled(rows.eager_of_row))


def grouped_peers(core: Callable[..., Tensor], tokens: int) -> dict[str, Peer]:
    """Attention over rows that are grouped by length, by a core of `buckets`, as peers whose `run` is a core."""

    def peer(attention: padded.PaddedAttention, grouping: buckets.Grouping, within: float, **more: Any) -> Peer:
        return Peer(functools.partial(core, attention, grouping), within=within, tokens=tokens, **more)

    def compiled_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        out: Tensor = compiled.compiled(padded.eager_in_group)(q, k, v, mask, scale)
        return out

    buckets_of = buckets.by_powers, buckets.BUCKET_WIDTH
    return {
        "bucketed SDPA": peer(buckets.sdpa_in_group, *buckets_of),
        "sorted SDPA": peer(buckets.sdpa_in_group, buckets.by_chunks, buckets.CHUNK_WIDTH),
        "torch.compile by bucket": peer(compiled_attention, *buckets_of, compiled=True, scores=2),
    }


def fbgemm_peer(run: AttentionCore, **more: Any) -> dict[str, Peer]:
    """FBGEMM's jagged operations, where they are installed; they know neither float64 nor GPUs here."""
    return {"FBGEMM": Peer(run, **more)} if fbgemm.installed() else {}


def varlen_peer(run: OpFunction) -> dict[str, Peer]:
    """PyTorch's own attention over packed rows, which only GPUs have."""
    return {"varlen_attn": Peer(run)} if cuda.is_available() else {}


def dense_cores() -> dict[str, Peer]:
    """Attention with dense queries, as peers whose `run` is an `AttentionCore`."""

    def with_width(attention: padded.PaddedAttention, multiple: int = 1) -> AttentionCore:
        return core_with_width(padded.attend_dense, attention, multiple)

    flex = with_width(compiled.flex_padded, compiled.FLEX_WIDTHS)
    return {
        "padded SDPA": Peer(with_width(padded.sdpa_with_mask), tokens=4),
        "per-row SDPA": Peer(rows.attend_dense),
        "nested SDPA": Peer(nested.attend_dense, tokens=4, scores=1),
        "eager with mask": Peer(with_width(padded.eager_with_mask), tokens=4, scores=3),
        **grouped_peers(buckets.attend_dense, tokens=4),
        **fbgemm_peer(fbgemm.attend_dense),
        "torch.compile": Peer(compiled_core(padded.attend_dense), compiled=True, tokens=4, scores=2),
        "torch.compile by row": Peer(compiled_by_row(rows.attend_dense), compiled=True),
        "FlexAttention": Peer(flex, compiled=True, trains=False, tokens=4),
        **varlen_peer(varlen.attend_dense),
    }
