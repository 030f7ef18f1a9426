"""`gated_cross_attention` in the bench: dense queries over packed keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from interformer_bench.ops.spec import BenchOp, GpuRow, GridRow, dense_flops
from interformer_bench.peers import Peer, cores, on_gpu

_GRID = (
    GridRow("movielens", rows=512, heads=4, head_size=16, queries=1, kind="pooled", bfloat16=True, quick=True),
    GridRow("beauty", rows=2048, heads=4, head_size=32, queries=8, kind="pooled", gated=True),
    GridRow("grocery", rows=2048, heads=2, head_size=32, queries=4, kind="pooled"),
    GridRow("diginetica", rows=2048, heads=4, head_size=16, queries=2, kind="pooled", gated=True),
    GridRow("uniform 1..50", rows=1024, heads=2, head_size=32, queries=16, kind="pooled", bfloat16=True, quick=True),
    GridRow(
        "log-normal, mean 100", rows=256, heads=4, head_size=32, queries=4, kind="pooled", bfloat16=True, gated=True
    ),
    GridRow("log-normal, mean 500", rows=64, heads=4, head_size=64, queries=16, kind="pooled"),
    GridRow("all 1024", rows=32, heads=8, head_size=64, queries=4, kind="full"),
    GridRow("all 104", rows=2048, heads=4, head_size=16, queries=4, kind="full", gated=True),
    GridRow("fill 0.1", rows=256, heads=4, head_size=32, queries=4, kind="pooled", memory=True),
    GridRow("fill 0.5", rows=128, heads=4, head_size=32, queries=8, kind="pooled"),
    GridRow("fill 1.0", rows=64, heads=4, head_size=32, queries=1, kind="full"),
)
_GPU_ROWS = (
    GpuRow(
        "all 104",
        name="cross-104",
        rank=9,
        rows=2048,
        heads=4,
        head_size=16,
        queries=2,
        gated=True,
        targets=(1.5, 1.5),
        compiled=True,
    ),
    GpuRow(
        "1000 at 0.5",
        name="cross-1000-m32",
        rank=12,
        rows=1152,
        heads=4,
        head_size=64,
        queries=32,
        gated=True,
        targets=(1.5, 1.5),
    ),
    GpuRow(
        "uniform 1..32",
        name="cross-tiny",
        rank=13,
        rows=65536,
        heads=2,
        head_size=32,
        queries=2,
        gated=True,
        targets=(3.0, 3.0),
    ),
)


def _gated(peers: Mapping[str, Peer]) -> dict[str, Peer]:
    return {name: replace(peer, run=cores.as_gated(peer.run)) for name, peer in peers.items()}


def _peers() -> dict[str, Peer]:
    return _gated(cores.dense_cores())


def _gpu_peers(lengths: Sequence[int]) -> dict[str, Peer]:
    return _gated(on_gpu.gpu_cores(lengths, packed=False))


def _index_options(lengths: Sequence[int]) -> Mapping[str, Any]:
    return {"query_lengths": tuple(reversed(lengths))}


OP = BenchOp(
    name="gated_cross_attention",
    grid=_GRID,
    flops=dense_flops,
    peers=_peers,
    memory_peers=("padded SDPA", "per-row SDPA"),
    gpu_rows=_GPU_ROWS,
    gpu_peers=_gpu_peers,
    attends=True,
    index_options=_index_options,
)
