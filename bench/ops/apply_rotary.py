"""`apply_rotary` in the bench: rotary embedding of packed tokens, the queries and keys of self-attention."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from interformer_bench.ops.call import Sizes
from interformer_bench.ops.spec import BenchOp, GpuRow, GridRow
from interformer_bench.peers import Peer, compiled, rotary
from torch import Tensor

# A memory-bound op: only the floor is a target.
_GRID = (
    GridRow("movielens", rows=256, heads=4, head_size=16, bfloat16=True, quick=True),
    GridRow("beauty", rows=1024, heads=4, head_size=32),
    GridRow("grocery", rows=1024, heads=2, head_size=32),
    GridRow("diginetica", rows=2048, heads=4, head_size=64),
    GridRow("uniform 1..50", rows=1024, heads=2, head_size=32, quick=True),
    GridRow("log-normal, mean 100", rows=256, heads=4, head_size=32, bfloat16=True),
    GridRow("log-normal, mean 500", rows=64, heads=4, head_size=64),
    GridRow("all 1024", rows=16, heads=8, head_size=64),
    GridRow("all 104", rows=2048, heads=4, head_size=16),
    GridRow("fill 0.1", rows=128, heads=4, head_size=32, memory=True),
    GridRow("fill 0.5", rows=64, heads=4, head_size=32),
    GridRow("fill 1.0", rows=32, heads=4, head_size=32),
)
_GPU_ROWS = (GpuRow("all 104", name="rotary-104", rank=17, rows=2048, heads=4, head_size=16, compiled=True),)


def _flops(lengths: Sequence[int], sizes: Sizes) -> tuple[int, int]:
    """`3 H D T` for each pass: a pair of channels takes 4 products and 2 sums."""
    rotation = 3 * sizes.heads * sizes.head_size * sum(lengths)
    return rotation, rotation


def _peers() -> dict[str, Peer]:
    def compiled_halves(x: Tensor, offsets: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = compiled.compiled(rotary.halves)(x, offsets, rope)
        return out

    return {
        "two halves": Peer(rotary.halves),
        "rotate_half": Peer(rotary.rotate_half),
        "padded": Peer(rotary.padded, tokens=3),
        "row by row": Peer(rotary.by_rows),
        "torch.compile": Peer(compiled_halves, compiled=True),
    }


def _gpu_peers(lengths: Sequence[int]) -> dict[str, Peer]:
    padded_rotary = functools.partial(rotary.padded, width=max(lengths, default=0))
    return {
        "two halves": Peer(rotary.halves),
        "rotate_half": Peer(rotary.rotate_half),
        "padded": Peer(padded_rotary, tokens=3),
    }


def _index_options(lengths: Sequence[int]) -> Mapping[str, Any]:
    return {"positions": True}


OP = BenchOp(
    name="apply_rotary",
    grid=_GRID,
    flops=_flops,
    peers=_peers,
    memory_peers=("padded", "two halves"),
    gpu_rows=_GPU_ROWS,
    gpu_peers=_gpu_peers,
    rotates=True,
    unread=("x",),
    index_options=_index_options,
)
