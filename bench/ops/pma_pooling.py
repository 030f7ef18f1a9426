"""`pma_pooling` in the bench: pooling by seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from interformer_bench.ops.spec import BenchOp, GpuRow, GridRow, dense_flops
from interformer_bench.peers import Peer, cores, on_gpu, scatter
from interformer_bench.shapes import REAL
from torch import Tensor

_GRID = (
    GridRow("movielens", rows=512, heads=4, head_size=16, queries=2, kind="pooled", bfloat16=True, quick=True),
    GridRow("beauty", rows=2048, heads=4, head_size=32, queries=4, kind="pooled"),
    GridRow("grocery", rows=2048, heads=2, head_size=32, queries=1, kind="pooled"),
    GridRow("diginetica", rows=2048, heads=4, head_size=16, queries=4, kind="pooled"),
    GridRow("uniform 1..50", rows=1024, heads=2, head_size=32, queries=4, kind="pooled", bfloat16=True, quick=True),
    GridRow("log-normal, mean 100", rows=256, heads=4, head_size=32, queries=4, kind="pooled", bfloat16=True),
    GridRow("log-normal, mean 500", rows=64, heads=4, head_size=64, queries=2, kind="pooled"),
    GridRow("all 1024", rows=32, heads=8, head_size=64, queries=4, kind="full"),
    GridRow("all 104", rows=2048, heads=4, head_size=16, queries=4, kind="full"),
    GridRow("fill 0.1", rows=256, heads=4, head_size=32, queries=4, kind="pooled", memory=True),
    GridRow("fill 0.5", rows=128, heads=4, head_size=32, queries=32, kind="pooled"),
    GridRow("fill 1.0", rows=64, heads=4, head_size=32, queries=2, kind="full"),
)
_GPU_ROWS = (
    GpuRow(
        "all 104",
        name="pma-104",
        rank=3,
        rows=2048,
        heads=4,
        head_size=16,
        queries=2,
        targets=(3.0, 3.0),
        compiled=True,
    ),
    GpuRow("all 4096", name="pma-4096", rank=7, rows=16, heads=8, head_size=64, queries=2, targets=(3.0, 3.0)),
    GpuRow(
        "1000 at 0.5", name="pma-1000-m32", rank=8, rows=1152, heads=4, head_size=64, queries=32, targets=(3.0, 3.0)
    ),
    GpuRow("uniform 1..32", name="pma-tiny", rank=10, rows=65536, heads=2, head_size=32, queries=2, targets=(3.0, 3.0)),
    GpuRow(
        "1000 at 1.0",
        name="pma-1000-m192",
        rank=15,
        rows=1152,
        heads=4,
        head_size=128,
        queries=192,
        targets=(3.0, 3.0),
    ),
)
_GPU_REAL_ROWS = tuple(
    GpuRow(real, name=f"pma-{real}", rows=4096, heads=4, head_size=32, queries=2, targets=(3.0, 3.0)) for real in REAL
)


def _index_add(seeds: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    return scatter.attend(seeds, k, v, offsets, cores.default_scale(seeds))


_INDEX_ADD = {"index-add": Peer(_index_add, spread=3)}


def pooling_peers() -> dict[str, Peer]:
    """The peers on the CPU, by name."""
    dense = {name: replace(peer, run=cores.as_pooling(peer.run)) for name, peer in cores.dense_cores().items()}
    return {**dense, **_INDEX_ADD}


def _gpu_peers(lengths: Sequence[int]) -> dict[str, Peer]:
    dense = on_gpu.gpu_cores(lengths, packed=False)
    return {**{name: replace(peer, run=cores.as_pooling(peer.run)) for name, peer in dense.items()}, **_INDEX_ADD}


OP = BenchOp(
    name="pma_pooling",
    grid=_GRID,
    flops=dense_flops,
    peers=pooling_peers,
    memory_peers=("padded SDPA", "per-row SDPA", "index-add"),
    gpu_rows=_GPU_ROWS,
    gpu_real_rows=_GPU_REAL_ROWS,
    gpu_peers=_gpu_peers,
    attends=True,
)
