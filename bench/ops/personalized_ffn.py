"""`personalized_ffn` in the bench: a linear layer per row."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from interformer_bench.ops.call import Sizes
from interformer_bench.ops.spec import BenchOp, GpuRow, GridRow
from interformer_bench.peers import Peer, buckets, compiled, fbgemm, padded, rows
from interformer_bench.peers.peer import PADDED_BMM
from torch import Tensor

# One head: its size is the width E of the tokens, and F equals E.
_GRID = (
    GridRow("movielens", rows=256, heads=1, head_size=64, kind="row weights", bfloat16=True, quick=True),
    GridRow("beauty", rows=1024, heads=1, head_size=64, kind="row weights"),
    GridRow("grocery", rows=1024, heads=1, head_size=64, kind="row weights"),
    GridRow("diginetica", rows=2048, heads=1, head_size=64, kind="row weights"),
    GridRow("uniform 1..50", rows=1024, heads=1, head_size=64, quick=True),
    GridRow("log-normal, mean 100", rows=256, heads=1, head_size=64),
    GridRow("log-normal, mean 500", rows=64, heads=1, head_size=64),
    GridRow("all 1024", rows=32, heads=1, head_size=64, kind="full"),
    GridRow("all 104", rows=2048, heads=1, head_size=64, kind="full"),
    GridRow("fill 0.1", rows=256, heads=1, head_size=64, memory=True),
    GridRow("fill 0.5", rows=128, heads=1, head_size=64),
    GridRow("fill 1.0", rows=64, heads=1, head_size=64, kind="full"),
)
_GPU_ROWS = (GpuRow("all 256", name="ffn-256", rank=16, rows=1152, heads=1, head_size=64, compiled=True),)


def _flops(lengths: Sequence[int], sizes: Sizes) -> tuple[int, int]:
    """`2 E F T`, and `4 E F T`."""
    product = 2 * sizes.head_size * sizes.width * sum(lengths)
    return product, 2 * product


def _peers() -> dict[str, Peer]:
    def padded_bmm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
        return padded.ffn(x, weight, offsets, bias, padded.longest(offsets))

    def compiled_bmm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = compiled.compiled(padded.ffn)(x, weight, offsets, bias, padded.longest(offsets))
        return out

    def compiled_rows(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
        return rows.ffn(x, weight, offsets, bias, compiled.compiled(rows.addmm_of_row))

    def grouped_bmm(grouping: buckets.Grouping, within: float) -> Peer:
        return Peer(functools.partial(buckets.ffn, grouping), within=within, tokens=2)

    return {
        "padded bmm": Peer(padded_bmm, group=PADDED_BMM, tokens=2),
        "row by row": Peer(rows.ffn),
        "bucketed bmm": grouped_bmm(buckets.by_powers, buckets.BUCKET_WIDTH),
        "sorted bmm": grouped_bmm(buckets.by_chunks, buckets.CHUNK_WIDTH),
        **({"FBGEMM": Peer(fbgemm.ffn)} if fbgemm.installed() else {}),
        "torch.compile by row": Peer(compiled_rows, compiled=True),
        "torch.compile": Peer(compiled_bmm, compiled=True, tokens=2),
    }


def _gpu_peers(lengths: Sequence[int]) -> dict[str, Peer]:
    def padded_bmm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
        return padded.ffn(x, weight, offsets, bias, max(lengths, default=0))

    return {"padded bmm": Peer(padded_bmm, group=PADDED_BMM, tokens=2)}


OP = BenchOp(
    name="personalized_ffn",
    grid=_GRID,
    flops=_flops,
    peers=_peers,
    memory_peers=("padded bmm", "row by row"),
    gpu_rows=_GPU_ROWS,
    gpu_peers=_gpu_peers,
    has_heads=False,
    has_width=True,
)
