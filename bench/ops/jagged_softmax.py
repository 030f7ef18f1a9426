"""`jagged_softmax` in the bench: weights from scores that are no dot products."""

from __future__ import annotations

from collections.abc import Sequence

from interformer_bench.ops.call import Sizes
from interformer_bench.ops.spec import BenchOp, GpuRow, GridRow
from interformer_bench.peers import Peer, compiled, own_scores
from interformer_bench.peers.padded import longest
from torch import Tensor

# The shapes of both ops of scores of one's own. Memory-bound: only the floor is a target.
GRID = (
    GridRow("movielens", rows=256, heads=1, head_size=64, bfloat16=True, quick=True),
    GridRow("beauty", rows=1024, heads=1, head_size=64),
    GridRow("grocery", rows=1024, heads=1, head_size=32),
    GridRow("diginetica", rows=2048, heads=1, head_size=64),
    GridRow("uniform 1..50", rows=1024, heads=1, head_size=32, quick=True),
    GridRow("log-normal, mean 100", rows=256, heads=4, head_size=16),
    GridRow("log-normal, mean 500", rows=64, heads=1, head_size=64),
    GridRow("all 1024", rows=16, heads=4, head_size=16),
    GridRow("all 104", rows=2048, heads=1, head_size=64),
    GridRow("fill 0.1", rows=256, heads=1, head_size=64, memory=True),
    GridRow("fill 0.5", rows=128, heads=1, head_size=64),
    GridRow("fill 1.0", rows=64, heads=1, head_size=64),
)
_GPU_ROWS = (GpuRow("all 104", name="softmax-104", rank=18, rows=2048, heads=1, head_size=64, compiled=True),)


def _flops(lengths: Sequence[int], sizes: Sizes) -> tuple[int, int]:
    """`4 H T`, and `8 H T`: an exponential counts as one."""
    scores = sizes.heads * sum(lengths)
    return 4 * scores, 8 * scores


def _peers() -> dict[str, Peer]:
    def padded(scores: Tensor, offsets: Tensor) -> Tensor:
        return own_scores.padded_softmax(scores, offsets, longest(offsets))

    def compiled_padded(scores: Tensor, offsets: Tensor) -> Tensor:
        out: Tensor = compiled.compiled(own_scores.padded_softmax)(scores, offsets, longest(offsets))
        return out

    return {
        "padded": Peer(padded, tokens=2),
        "scattered": Peer(own_scores.scattered_softmax),
        "row by row": Peer(own_scores.rows_softmax),
        "torch.compile": Peer(compiled_padded, compiled=True, tokens=2),
    }


def _gpu_peers(lengths: Sequence[int]) -> dict[str, Peer]:
    def padded(scores: Tensor, offsets: Tensor) -> Tensor:
        return own_scores.padded_softmax(scores, offsets, max(lengths, default=0))

    return {"padded": Peer(padded, tokens=2), "scattered": Peer(own_scores.scattered_softmax)}


OP = BenchOp(
    name="jagged_softmax",
    grid=GRID,
    flops=_flops,
    peers=_peers,
    memory_peers=("padded", "scattered"),
    gpu_rows=_GPU_ROWS,
    gpu_peers=_gpu_peers,
)
