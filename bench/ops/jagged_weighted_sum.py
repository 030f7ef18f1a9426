"""`jagged_weighted_sum` in the bench: sums of values with weights of their own."""

from __future__ import annotations

from collections.abc import Sequence

from interformer_bench.ops.call import Sizes
from interformer_bench.ops.jagged_softmax import GRID
from interformer_bench.ops.spec import BenchOp, GpuRow
from interformer_bench.peers import Peer, compiled, own_scores
from interformer_bench.peers.padded import longest
from torch import Tensor

_GPU_ROWS = (GpuRow("all 104", name="sum-104", rank=19, rows=2048, heads=1, head_size=64, compiled=True),)


def _flops(lengths: Sequence[int], sizes: Sizes) -> tuple[int, int]:
    """`2 H D T`, and `4 H D T`."""
    product = 2 * sizes.heads * sizes.head_size * sum(lengths)
    return product, 2 * product


def _peers() -> dict[str, Peer]:
    def padded(weights: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        return own_scores.padded_sum(weights, v, offsets, longest(offsets))

    def compiled_padded(weights: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        out: Tensor = compiled.compiled(own_scores.padded_sum)(weights, v, offsets, longest(offsets))
        return out

    return {
        "padded": Peer(padded, tokens=2),
        "scattered": Peer(own_scores.scattered_sum),
        "row by row": Peer(own_scores.rows_sum),
        "torch.compile": Peer(compiled_padded, compiled=True, tokens=2),
    }


def _gpu_peers(lengths: Sequence[int]) -> dict[str, Peer]:
    def padded(weights: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        return own_scores.padded_sum(weights, v, offsets, max(lengths, default=0))

    return {"padded": Peer(padded, tokens=2), "scattered": Peer(own_scores.scattered_sum)}


OP = BenchOp(
    name="jagged_weighted_sum",
    grid=GRID,
    flops=_flops,
    peers=_peers,
    memory_peers=("padded", "scattered"),
    gpu_rows=_GPU_ROWS,
    gpu_peers=_gpu_peers,
)
