"""The named shapes: each is an op on a distribution of row lengths at one size, with its kind of target.

Every op meets every distribution, and every size is used somewhere, but not in every combination. A shape stays when
its result looks bad. The number of rows is chosen so that a call takes milliseconds to a second on one core. "all 104"
with 2048 rows and width 64 is the shape of the InterFormer paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from interformer_bench import targets, workloads
from interformer_bench.shapes import LengthDistribution
from interformer_bench.workloads import Inputs, Sizes


@dataclass(frozen=True)
class Shape:
    """One op on one batch.

    Attributes:
        rows: number of rows; their lengths are drawn from `distribution`.
        kind: kind of target, one of `targets.KINDS`.
        dtypes: dtypes it is measured in unless others are requested.
        quick: whether `--quick` measures it.
        memory: whether its peak memory is measured too.
    """

    op: str
    distribution: LengthDistribution
    rows: int
    sizes: Sizes = field(default_factory=Sizes)
    kind: str = "none"
    dtypes: tuple[str, ...] = ("float32",)
    quick: bool = False
    memory: bool = False

    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each row."""
        return self.distribution.lengths(self.rows)

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        """The arguments of one call, and its `grad_out`; the lengths do not depend on the seed."""
        return workloads.inputs(self.op, self.lengths(), self.sizes, dtype, device, seed)

    def target(self, dtype: str) -> targets.Target:
        """The target of this shape in a dtype."""
        return targets.target(self.kind, dtype)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One line of the grid; `distribution` is the name of a length distribution.

    Attributes:
        bfloat16: it is measured in bfloat16 besides float32.
        gated: with a gate and a residual.
    """

    distribution: str = field(kw_only=False)
    rows: int
    heads: int
    head_size: int
    queries: int = 1
    kind: str = "none"
    bfloat16: bool = False
    gated: bool = False
    quick: bool = False
    memory: bool = False

    def shape(self, op: str, distribution: LengthDistribution) -> Shape:
        width = self.heads * self.head_size if op in ("pma_folded", "personalized_ffn") else 0
        sizes = Sizes(self.heads, self.head_size, self.queries, width, self.gated)
        dtypes = ("float32", "bfloat16") if self.bfloat16 else ("float32",)
        return Shape(op, distribution, self.rows, sizes, self.kind, dtypes, self.quick, self.memory)


_JAGGED = (
    _Row("movielens", rows=256, heads=4, head_size=16, kind="short rows", bfloat16=True, quick=True),
    _Row("beauty", rows=1024, heads=4, head_size=32, kind="short rows", bfloat16=True),
    _Row("grocery", rows=1024, heads=2, head_size=32, kind="short rows"),
    _Row("diginetica", rows=2048, heads=4, head_size=64, kind="short rows"),
    _Row("uniform 1..50", rows=1024, heads=2, head_size=32, kind="short rows", bfloat16=True, quick=True),
    _Row("log-normal, mean 100", rows=256, heads=4, head_size=32, kind="middle rows", bfloat16=True, quick=True),
    _Row("log-normal, mean 500", rows=64, heads=4, head_size=64, kind="long rows", bfloat16=True),
    _Row("all 1024", rows=16, heads=8, head_size=64, kind="long rows", bfloat16=True),
    _Row("all 104", rows=2048, heads=4, head_size=16, kind="full", bfloat16=True),
    _Row("fill 0.1", rows=128, heads=4, head_size=32, memory=True),
    _Row("fill 0.5", rows=64, heads=4, head_size=32),
    _Row("fill 1.0", rows=32, heads=4, head_size=32, kind="full", quick=True),
)
_POOLING = (
    _Row("movielens", rows=512, heads=4, head_size=16, queries=2, kind="pooled", bfloat16=True, quick=True),
    _Row("beauty", rows=2048, heads=4, head_size=32, queries=4, kind="pooled"),
    _Row("grocery", rows=2048, heads=2, head_size=32, queries=1, kind="pooled"),
    _Row("diginetica", rows=2048, heads=4, head_size=16, queries=4, kind="pooled"),
    _Row("uniform 1..50", rows=1024, heads=2, head_size=32, queries=4, kind="pooled", bfloat16=True, quick=True),
    _Row("log-normal, mean 100", rows=256, heads=4, head_size=32, queries=4, kind="pooled", bfloat16=True),
    _Row("log-normal, mean 500", rows=64, heads=4, head_size=64, queries=2, kind="pooled"),
    _Row("all 1024", rows=32, heads=8, head_size=64, queries=4, kind="full"),
    _Row("all 104", rows=2048, heads=4, head_size=16, queries=4, kind="full"),
    _Row("fill 0.1", rows=256, heads=4, head_size=32, queries=4, kind="pooled", memory=True),
    _Row("fill 0.5", rows=128, heads=4, head_size=32, queries=32, kind="pooled"),
    _Row("fill 1.0", rows=64, heads=4, head_size=32, queries=2, kind="full"),
)
# Heads times head size is the width of the tokens.
_FOLDED = (
    _Row("movielens", rows=256, heads=4, head_size=16, queries=4, kind="folded", quick=True),
    _Row("beauty", rows=1024, heads=8, head_size=16, queries=2, kind="folded"),
    _Row("grocery", rows=1024, heads=4, head_size=16, queries=2, kind="folded"),
    _Row("diginetica", rows=2048, heads=4, head_size=16, queries=2, kind="folded"),
    _Row("uniform 1..50", rows=1024, heads=4, head_size=16, queries=4, kind="folded", bfloat16=True, quick=True),
    _Row("uniform 1..50", rows=1024, heads=8, head_size=16, queries=2, kind="folded"),
    _Row("log-normal, mean 100", rows=256, heads=4, head_size=16, queries=4, kind="folded", bfloat16=True),
    _Row("log-normal, mean 100", rows=256, heads=8, head_size=16, queries=2, kind="folded"),
    _Row("log-normal, mean 500", rows=64, heads=4, head_size=16, queries=4, kind="folded"),
    _Row("all 1024", rows=64, heads=4, head_size=16, queries=4, kind="folded"),
    _Row("all 104", rows=2048, heads=4, head_size=16, queries=4, kind="folded"),
    _Row("fill 0.1", rows=256, heads=4, head_size=16, queries=4, kind="folded", memory=True),
    _Row("fill 0.5", rows=128, heads=4, head_size=16, queries=2, kind="folded"),
    _Row("fill 1.0", rows=64, heads=4, head_size=16, queries=4, kind="folded"),
)
_CROSS = (
    _Row("movielens", rows=512, heads=4, head_size=16, queries=1, kind="pooled", bfloat16=True, quick=True),
    _Row("beauty", rows=2048, heads=4, head_size=32, queries=8, kind="pooled", gated=True),
    _Row("grocery", rows=2048, heads=2, head_size=32, queries=4, kind="pooled"),
    _Row("diginetica", rows=2048, heads=4, head_size=16, queries=2, kind="pooled", gated=True),
    _Row("uniform 1..50", rows=1024, heads=2, head_size=32, queries=16, kind="pooled", bfloat16=True, quick=True),
    _Row("log-normal, mean 100", rows=256, heads=4, head_size=32, queries=4, kind="pooled", bfloat16=True, gated=True),
    _Row("log-normal, mean 500", rows=64, heads=4, head_size=64, queries=16, kind="pooled"),
    _Row("all 1024", rows=32, heads=8, head_size=64, queries=4, kind="full"),
    _Row("all 104", rows=2048, heads=4, head_size=16, queries=4, kind="full", gated=True),
    _Row("fill 0.1", rows=256, heads=4, head_size=32, queries=4, kind="pooled", memory=True),
    _Row("fill 0.5", rows=128, heads=4, head_size=32, queries=8, kind="pooled"),
    _Row("fill 1.0", rows=64, heads=4, head_size=32, queries=1, kind="full"),
)
# The queries and keys of self-attention. A memory-bound op: only the floor is a target.
_ROTARY = (
    _Row("movielens", rows=256, heads=4, head_size=16, bfloat16=True, quick=True),
    _Row("beauty", rows=1024, heads=4, head_size=32),
    _Row("grocery", rows=1024, heads=2, head_size=32),
    _Row("diginetica", rows=2048, heads=4, head_size=64),
    _Row("uniform 1..50", rows=1024, heads=2, head_size=32, quick=True),
    _Row("log-normal, mean 100", rows=256, heads=4, head_size=32, bfloat16=True),
    _Row("log-normal, mean 500", rows=64, heads=4, head_size=64),
    _Row("all 1024", rows=16, heads=8, head_size=64),
    _Row("all 104", rows=2048, heads=4, head_size=16),
    _Row("fill 0.1", rows=128, heads=4, head_size=32, memory=True),
    _Row("fill 0.5", rows=64, heads=4, head_size=32),
    _Row("fill 1.0", rows=32, heads=4, head_size=32),
)
# One head: its size is the width E of the tokens, and F equals E.
_FFN = (
    _Row("movielens", rows=256, heads=1, head_size=64, kind="row weights", bfloat16=True, quick=True),
    _Row("beauty", rows=1024, heads=1, head_size=64, kind="row weights"),
    _Row("grocery", rows=1024, heads=1, head_size=64, kind="row weights"),
    _Row("diginetica", rows=2048, heads=1, head_size=64, kind="row weights"),
    _Row("uniform 1..50", rows=1024, heads=1, head_size=64, quick=True),
    _Row("log-normal, mean 100", rows=256, heads=1, head_size=64),
    _Row("log-normal, mean 500", rows=64, heads=1, head_size=64),
    _Row("all 1024", rows=32, heads=1, head_size=64, kind="full"),
    _Row("all 104", rows=2048, heads=1, head_size=64, kind="full"),
    _Row("fill 0.1", rows=256, heads=1, head_size=64, memory=True),
    _Row("fill 0.5", rows=128, heads=1, head_size=64),
    _Row("fill 1.0", rows=64, heads=1, head_size=64, kind="full"),
)
_GRID: Mapping[str, tuple[_Row, ...]] = {
    "jagged_attention": _JAGGED,
    "pma_pooling": _POOLING,
    "pma_folded": _FOLDED,
    "gated_cross_attention": _CROSS,
    "apply_rotary": _ROTARY,
    "personalized_ffn": _FFN,
}


def shapes(
    distributions: Mapping[str, LengthDistribution],
    ops: Iterable[str] = workloads.OPS,
    names: Iterable[str] | None = None,
    rows: int | None = None,
    quick: bool = False,
) -> list[Shape]:
    """The grid of these ops and length distributions; `rows` replaces every shape's own number of rows.

    `quick` selects a few shapes of each op, unless distributions are named.
    """
    selected = set(distributions if names is None else names)
    matching = [
        row.shape(op, distributions[row.distribution])
        for op in ops
        for row in _GRID[op]
        if row.distribution in selected
    ]
    chosen = [shape for shape in matching if shape.quick] if quick and names is None else matching
    return [shape if rows is None else replace(shape, rows=rows) for shape in chosen]
