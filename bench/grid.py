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
from interformer_bench.ops.spec import BenchOp, GridRow
from interformer_bench.ops.table import TABLE
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


def _shape(op: BenchOp, row: GridRow, distribution: LengthDistribution) -> Shape:
    dtypes = ("float32", "bfloat16") if row.bfloat16 else ("float32",)
    return Shape(op.name, distribution, row.rows, op.sizes(row), row.kind, dtypes, row.quick, row.memory)


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
        _shape(TABLE[op], row, distributions[row.distribution])
        for op in ops
        for row in TABLE[op].grid
        if row.distribution in selected
    ]
    chosen = [shape for shape in matching if shape.quick] if quick and names is None else matching
    return [shape if rows is None else replace(shape, rows=rows) for shape in chosen]
