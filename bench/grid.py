"""The named shapes: which op on which law of lengths at which size, and which kind of target each belongs to.

Not every law at every size: every law for each op, and every size somewhere. A shape stays when it looks bad. Rows of a
batch are chosen so that a call takes milliseconds to a second on one core; "all 104", 2048 rows, width 64 is the
InterFormer paper's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from interformer_bench import targets, workloads
from interformer_bench.shapes import Law
from interformer_bench.workloads import Inputs, Sizes


@dataclass(frozen=True)
class Shape:
    """One op on one batch.

    Attributes:
        rows: of the batch, their lengths drawn from `law`.
        kind: of target, one of `targets.KINDS`.
        dtypes: in which it is measured where nothing else is asked for.
        quick: it is one of the few that `--quick` measures.
        memory: its peak memory is measured too.
    """

    op: str
    law: Law
    rows: int
    sizes: Sizes = field(default_factory=Sizes)
    kind: str = "none"
    dtypes: tuple[str, ...] = ("float32",)
    quick: bool = False
    memory: bool = False

    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return self.law.lengths(self.rows)

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        """The arguments of one call, and its `grad_out`; the lengths are the same whatever the seed."""
        return workloads.inputs(self.op, self.lengths(), self.sizes, dtype, device, seed)

    def target(self, dtype: str) -> targets.Target:
        """What it shall reach."""
        return targets.target(self.kind, dtype)


# law, rows, heads, head size, queries, kind, marks: "b" also in bfloat16, "q" quick, "m" memory too, "g" gated
_Line = tuple[str, int, int, int, int, str, str]

_JAGGED: tuple[_Line, ...] = (
    ("movielens", 256, 4, 16, 1, "short rows", "bq"),
    ("beauty", 1024, 4, 32, 1, "short rows", "b"),
    ("grocery", 1024, 2, 32, 1, "short rows", ""),
    ("diginetica", 2048, 4, 64, 1, "short rows", ""),
    ("uniform 1..50", 1024, 2, 32, 1, "short rows", "bq"),
    ("log-normal, mean 100", 256, 4, 32, 1, "middle rows", "bq"),
    ("log-normal, mean 500", 64, 4, 64, 1, "long rows", "b"),
    ("all 1024", 16, 8, 64, 1, "long rows", "b"),
    ("all 104", 2048, 4, 16, 1, "full", "b"),
    ("fill 0.1", 128, 4, 32, 1, "none", "m"),
    ("fill 0.5", 64, 4, 32, 1, "none", ""),
    ("fill 1.0", 32, 4, 32, 1, "full", "q"),
)
_POOLING: tuple[_Line, ...] = (
    ("movielens", 512, 4, 16, 2, "pooled", "bq"),
    ("beauty", 2048, 4, 32, 4, "pooled", ""),
    ("grocery", 2048, 2, 32, 1, "pooled", ""),
    ("diginetica", 2048, 4, 16, 4, "pooled", ""),
    ("uniform 1..50", 1024, 2, 32, 4, "pooled", "bq"),
    ("log-normal, mean 100", 256, 4, 32, 4, "pooled", "b"),
    ("log-normal, mean 500", 64, 4, 64, 2, "pooled", ""),
    ("all 1024", 32, 8, 64, 4, "full", ""),
    ("all 104", 2048, 4, 16, 4, "full", ""),
    ("fill 0.1", 256, 4, 32, 4, "pooled", "m"),
    ("fill 0.5", 128, 4, 32, 32, "pooled", ""),
    ("fill 1.0", 64, 4, 32, 2, "full", ""),
)
# Heads times head size is the width of the tokens.
_FOLDED: tuple[_Line, ...] = (
    ("movielens", 256, 4, 16, 4, "folded", "q"),
    ("beauty", 1024, 8, 16, 2, "folded", ""),
    ("grocery", 1024, 4, 16, 2, "folded", ""),
    ("diginetica", 2048, 4, 16, 2, "folded", ""),
    ("uniform 1..50", 1024, 4, 16, 4, "folded", "bq"),
    ("uniform 1..50", 1024, 8, 16, 2, "folded", ""),
    ("log-normal, mean 100", 256, 4, 16, 4, "folded", "b"),
    ("log-normal, mean 100", 256, 8, 16, 2, "folded", ""),
    ("log-normal, mean 500", 64, 4, 16, 4, "folded", ""),
    ("all 1024", 64, 4, 16, 4, "folded", ""),
    ("all 104", 2048, 4, 16, 4, "folded", ""),
    ("fill 0.1", 256, 4, 16, 4, "folded", "m"),
    ("fill 0.5", 128, 4, 16, 2, "folded", ""),
    ("fill 1.0", 64, 4, 16, 4, "folded", ""),
)
_CROSS: tuple[_Line, ...] = (
    ("movielens", 512, 4, 16, 1, "pooled", "bq"),
    ("beauty", 2048, 4, 32, 8, "pooled", "g"),
    ("grocery", 2048, 2, 32, 4, "pooled", ""),
    ("diginetica", 2048, 4, 16, 2, "pooled", "g"),
    ("uniform 1..50", 1024, 2, 32, 16, "pooled", "bq"),
    ("log-normal, mean 100", 256, 4, 32, 4, "pooled", "bg"),
    ("log-normal, mean 500", 64, 4, 64, 16, "pooled", ""),
    ("all 1024", 32, 8, 64, 4, "full", ""),
    ("all 104", 2048, 4, 16, 4, "full", "g"),
    ("fill 0.1", 256, 4, 32, 4, "pooled", "m"),
    ("fill 0.5", 128, 4, 32, 8, "pooled", ""),
    ("fill 1.0", 64, 4, 32, 1, "full", ""),
)
# No target but the floor: a copy that turns numbers on its way. The queries and keys of attention inside rows.
_ROTARY: tuple[_Line, ...] = (
    ("movielens", 256, 4, 16, 1, "none", "bq"),
    ("beauty", 1024, 4, 32, 1, "none", ""),
    ("grocery", 1024, 2, 32, 1, "none", ""),
    ("diginetica", 2048, 4, 64, 1, "none", ""),
    ("uniform 1..50", 1024, 2, 32, 1, "none", "q"),
    ("log-normal, mean 100", 256, 4, 32, 1, "none", "b"),
    ("log-normal, mean 500", 64, 4, 64, 1, "none", ""),
    ("all 1024", 16, 8, 64, 1, "none", ""),
    ("all 104", 2048, 4, 16, 1, "none", ""),
    ("fill 0.1", 128, 4, 32, 1, "none", "m"),
    ("fill 0.5", 64, 4, 32, 1, "none", ""),
    ("fill 1.0", 32, 4, 32, 1, "none", ""),
)
# One head: its size is the width E of the tokens, and F is as wide.
_FFN: tuple[_Line, ...] = (
    ("movielens", 256, 1, 64, 1, "row weights", "bq"),
    ("beauty", 1024, 1, 64, 1, "row weights", ""),
    ("grocery", 1024, 1, 64, 1, "row weights", ""),
    ("diginetica", 2048, 1, 64, 1, "row weights", ""),
    ("uniform 1..50", 1024, 1, 64, 1, "none", "q"),
    ("log-normal, mean 100", 256, 1, 64, 1, "none", ""),
    ("log-normal, mean 500", 64, 1, 64, 1, "none", ""),
    ("all 1024", 32, 1, 64, 1, "full", ""),
    ("all 104", 2048, 1, 64, 1, "full", ""),
    ("fill 0.1", 256, 1, 64, 1, "none", "m"),
    ("fill 0.5", 128, 1, 64, 1, "none", ""),
    ("fill 1.0", 64, 1, 64, 1, "full", ""),
)
_GRID: Mapping[str, tuple[_Line, ...]] = {
    "jagged_attention": _JAGGED,
    "pma_pooling": _POOLING,
    "pma_folded": _FOLDED,
    "gated_cross_attention": _CROSS,
    "apply_rotary": _ROTARY,
    "personalized_ffn": _FFN,
}


def _shape(op: str, line: _Line, law: Law) -> Shape:
    _, rows, heads, head_size, queries, kind, marks = line
    width = heads * head_size if op in ("pma_folded", "personalized_ffn") else 0
    sizes = Sizes(heads, head_size, queries, width, gated="g" in marks)
    dtypes = ("float32", "bfloat16") if "b" in marks else ("float32",)
    return Shape(op, law, rows, sizes, kind, dtypes, quick="q" in marks, memory="m" in marks)


def shapes(
    laws: Mapping[str, Law],
    ops: Iterable[str] = workloads.OPS,
    names: Iterable[str] | None = None,
    rows: int | None = None,
    quick: bool = False,
) -> list[Shape]:
    """The grid of these ops and laws; on batches of `rows` rows where given.

    Where it shall be quick and no law is named, a few shapes of each op.
    """
    wanted = set(laws if names is None else names)
    found = [_shape(op, line, laws[line[0]]) for op in ops for line in _GRID[op] if line[0] in wanted]
    chosen = [shape for shape in found if shape.quick] if quick and names is None else found
    return [shape if rows is None else replace(shape, rows=rows) for shape in chosen]
