"""The declaration of an op to the bench."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from interformer_bench.ops.call import OpFunction, Sizes
from interformer_bench.peers import Peer


@dataclass(frozen=True, kw_only=True)
class Row:
    """A batch, and the sizes of a call on it.

    Attributes:
        distribution: name of the distribution of row lengths.
        rows: number of rows.
        gated: with a gate and a residual.
    """

    distribution: str = field(kw_only=False)
    rows: int
    heads: int
    head_size: int
    queries: int = 1
    gated: bool = False


@dataclass(frozen=True, kw_only=True)
class GridRow(Row):
    """One line of the grid.

    Attributes:
        kind: kind of target, one of `targets.KINDS`.
        bfloat16: it is measured in bfloat16 besides float32.
        quick: whether `--quick` measures it.
        memory: whether its peak memory is measured too.
    """

    kind: str = "none"
    bfloat16: bool = False
    quick: bool = False
    memory: bool = False


@dataclass(frozen=True, kw_only=True)
class GpuRow(Row):
    """One line of the jobs on a GPU (`gpu_jobs.py`).

    Attributes:
        name: name of the job, without its dtype.
        rank: its place in the order of value, among the lines of all ops; part 1 is those up to `gpu_jobs.HEADLINE`.
        targets: target ratios to the fastest right peer, forward and forward+backward.
        compiled: whether it has a job for compiled peers and FlexAttention, too.
    """

    name: str
    rank: int = 0
    targets: tuple[float | None, float | None] = (None, None)
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A computation around an op of this package.

    Attributes:
        kernel: the op of this package whose kernel does the work.
        differentiable: names of the inputs that get gradients.
        inputs: as `workloads.inputs`, without the op.
        definition: the computation in eager PyTorch.
        ours: the computation by this package, from the name of a backend.
    """

    kernel: str
    differentiable: tuple[str, ...]
    inputs: Callable[[Sequence[int], Sizes, torch.dtype, str, int], dict[str, Any]]
    definition: OpFunction
    ours: Callable[[str | None], OpFunction]


def _no_options(lengths: Sequence[int]) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class BenchOp:
    """One op, or a computation around one.

    Attributes:
        grid: its part of the grid of shapes.
        flops: the FLOPs of the forward and of the backward alone; only useful ones, a multiply-add is two.
        peers: makes its peers on the CPU, by name.
        memory_peers: peers whose peak memory is measured; this package's is compared with the first one's.
        gpu_rows: its jobs on a GPU.
        gpu_real_rows: its jobs on real lengths, which are measured in bfloat16 alone.
        gpu_peers: makes its peers on a GPU for rows of these lengths; None where it is not measured there.
        composed: what differs from a plain op of this package, or None.
        attends: whether it is attention, with gate and residual.
        packed_queries: whether each token of a row is a query, so that the work grows with the square of the length.
        rotates: whether it takes rotary tables; here they are as wide as a head.
        has_heads: whether its tokens have heads.
        has_width: whether calls have a `Sizes.width`; in grid and jobs it is heads times head size.
        unread: inputs that the backward does not read.
        index_options: options of a `testing.Case` of these lengths that has every index argument of the op.
    """

    name: str
    grid: tuple[GridRow, ...]
    flops: Callable[[Sequence[int], Sizes], tuple[int, int]]
    peers: Callable[[], dict[str, Peer]]
    memory_peers: tuple[str, ...]
    gpu_rows: tuple[GpuRow, ...] = ()
    gpu_real_rows: tuple[GpuRow, ...] = ()
    gpu_peers: Callable[[Sequence[int]], dict[str, Peer]] | None = None
    composed: Composed | None = None
    attends: bool = False
    packed_queries: bool = False
    rotates: bool = False
    has_heads: bool = True
    has_width: bool = False
    unread: tuple[str, ...] = ()
    index_options: Callable[[Sequence[int]], Mapping[str, Any]] = _no_options

    @property
    def kernel(self) -> str:
        """The op of this package whose kernel does the work."""
        return self.composed.kernel if self.composed else self.name

    def sizes(self, row: Row) -> Sizes:
        """The sizes of one of its lines."""
        width = row.heads * row.head_size if self.has_width else 0
        return Sizes(row.heads, row.head_size, row.queries, width, row.gated)


def attention_flops(product: int) -> tuple[int, int]:
    """The FLOPs of attention, from those of one product with the scores.

    The forward makes scores and the weighted sum; the backward makes the scores again, and two products for each.
    """
    return 2 * product, 5 * product


def dense_flops(lengths: Sequence[int], sizes: Sizes) -> tuple[int, int]:
    """`4 M H D T`, and `10 M H D T`: every token is a key of `M` queries."""
    return attention_flops(2 * sizes.queries * sizes.heads * sizes.head_size * sum(lengths))
