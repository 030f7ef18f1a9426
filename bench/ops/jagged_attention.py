"""`jagged_attention` in the bench: attention inside rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from interformer_bench.ops.call import OpFunction, Sizes
from interformer_bench.ops.spec import BenchOp, GpuRow, GridRow, attention_flops
from interformer_bench.peers import Peer, buckets, compiled, cores, fbgemm, nested, on_gpu, padded, rows, varlen
from interformer_bench.shapes import REAL

_GRID = (
    GridRow("movielens", rows=256, heads=4, head_size=16, kind="short rows", bfloat16=True, quick=True),
    GridRow("beauty", rows=1024, heads=4, head_size=32, kind="short rows", bfloat16=True),
    GridRow("grocery", rows=1024, heads=2, head_size=32, kind="short rows"),
    GridRow("diginetica", rows=2048, heads=4, head_size=64, kind="short rows"),
    GridRow("uniform 1..50", rows=1024, heads=2, head_size=32, kind="short rows", bfloat16=True, quick=True),
    GridRow("log-normal, mean 100", rows=256, heads=4, head_size=32, kind="middle rows", bfloat16=True, quick=True),
    GridRow("log-normal, mean 500", rows=64, heads=4, head_size=64, kind="long rows", bfloat16=True),
    GridRow("all 1024", rows=16, heads=8, head_size=64, kind="long rows", bfloat16=True),
    GridRow("all 104", rows=2048, heads=4, head_size=16, kind="full", bfloat16=True),
    GridRow("fill 0.1", rows=128, heads=4, head_size=32, memory=True),
    GridRow("fill 0.5", rows=64, heads=4, head_size=32),
    GridRow("fill 1.0", rows=32, heads=4, head_size=32, kind="full", quick=True),
)
_GPU_ROWS = (
    GpuRow(
        "all 104", name="jagged-104-d16", rank=1, rows=2048, heads=4, head_size=16, targets=(None, 1.5), compiled=True
    ),
    GpuRow("all 104", name="jagged-104-d64", rank=2, rows=2048, heads=1, head_size=64, targets=(None, 1.5)),
    GpuRow("uniform 1..32", name="jagged-tiny", rank=4, rows=65536, heads=2, head_size=32, targets=(3.0, 3.0)),
    GpuRow(
        "1000 at 0.5",
        name="jagged-1000-d64",
        rank=5,
        rows=1152,
        heads=4,
        head_size=64,
        targets=(None, 0.8),
        compiled=True,
    ),
    GpuRow("all 4096", name="jagged-4096-d64", rank=6, rows=16, heads=8, head_size=64, targets=(None, 0.8)),
    GpuRow("all 54", name="jagged-54-d8", rank=11, rows=2048, heads=8, head_size=8, targets=(None, 1.5)),
    GpuRow("1000 at 1.0", name="jagged-1000-d128", rank=14, rows=1152, heads=4, head_size=128, targets=(None, 0.8)),
)
_GPU_REAL_ROWS = tuple(
    GpuRow(real, name=f"jagged-{real}", rows=4096, heads=4, head_size=32, targets=(None, 1.5)) for real in REAL
)


def _flops(lengths: Sequence[int], sizes: Sizes) -> tuple[int, int]:
    """`4 H D sum(L^2)`, and `10 H D sum(L^2)`."""
    return attention_flops(2 * sizes.heads * sizes.head_size * sum(length * length for length in lengths))


def _peers() -> dict[str, Peer]:
    def with_width(attention: padded.PaddedAttention) -> OpFunction:
        return cores.as_jagged(cores.core_with_width(padded.attend_jagged, attention))

    return {
        "padded SDPA": Peer(with_width(padded.sdpa_with_mask), tokens=5),
        "per-row SDPA": Peer(cores.as_jagged(rows.attend_jagged)),
        "nested SDPA": Peer(cores.as_jagged(nested.attend_jagged), tokens=5, scores=1),
        "eager with mask": Peer(with_width(padded.eager_with_mask), tokens=5, scores=3),
        **{
            name: replace(peer, run=cores.as_jagged(peer.run))
            for name, peer in {
                **cores.grouped_peers(buckets.attend_jagged, tokens=5),
                **cores.fbgemm_peer(fbgemm.attend_jagged, tokens=5),
                "torch.compile by row": Peer(cores.compiled_by_row(rows.attend_jagged), compiled=True),
            }.items()
        },
        "torch.compile": Peer(
            cores.as_jagged(cores.compiled_core(padded.attend_jagged)), compiled=True, tokens=5, scores=2
        ),
        "FlexAttention": Peer(cores.as_jagged(compiled.flex_jagged), compiled=True, trains=False),
        **cores.varlen_peer(cores.as_jagged(varlen.attend_jagged)),
    }


def _gpu_peers(lengths: Sequence[int]) -> dict[str, Peer]:
    peers = on_gpu.gpu_cores(lengths, packed=True)
    return {name: replace(peer, run=cores.as_jagged(peer.run)) for name, peer in peers.items()}


def _index_options(lengths: Sequence[int]) -> Mapping[str, Any]:
    return {"query_lengths": tuple(reversed(lengths)), "rope": 32, "positions": True}


OP = BenchOp(
    name="jagged_attention",
    grid=_GRID,
    flops=_flops,
    peers=_peers,
    memory_peers=("padded SDPA", "per-row SDPA"),
    gpu_rows=_GPU_ROWS,
    gpu_real_rows=_GPU_REAL_ROWS,
    gpu_peers=_gpu_peers,
    attends=True,
    packed_queries=True,
    index_options=_index_options,
)
