"""The jobs that are measured on a GPU, in order of value: each is one shape in one dtype, for a process of its own.

Part 1 comes first because it matters most: the machine's ceilings, and bfloat16 on the shapes of the paper's public
model, of tiny rows, of training and of long rows. Part 2 is the rest: float32, real lengths, and (on request) compiled
peers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from interformer_bench import shapes
from interformer_bench.grid import Shape
from interformer_bench.shapes import LengthDistribution
from interformer_bench.workloads import Sizes

# Upper bounds of a rehearsal's shapes: rows, tokens of a row, and sizes.
_TINY_ROWS, _TINY_LENGTH, _TINY_SIZES = 8, 24, Sizes(heads=2, head_size=16, queries=3)

_NO_TARGET = (None, None)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One line of the tables below; `distribution` is the name of a length distribution.

    Attributes:
        name: name of the job, without its dtype.
        gated: with a gate and a residual.
        targets: target ratios to the fastest right peer, forward and forward+backward.
    """

    name: str = field(kw_only=False)
    op: str = field(kw_only=False)
    distribution: str = field(kw_only=False)
    rows: int
    heads: int
    head_size: int
    queries: int = 1
    gated: bool = False
    targets: tuple[float | None, float | None] = _NO_TARGET

    def job(
        self, distributions: Mapping[str, LengthDistribution], part: int, dtype: str, tiny: bool, compiled: bool = False
    ) -> Job:
        width = self.heads * self.head_size if self.op == "personalized_ffn" else 0
        sizes = Sizes(self.heads, self.head_size, self.queries, width, self.gated)
        shape = Shape(self.op, distributions[self.distribution], self.rows, sizes)
        shape = _rehearsed(shape) if tiny else shape
        name = f"{self.name}-{_SHORT[dtype]}{'-compiled' if compiled else ''}"
        seconds = _COMPILED_SECONDS if compiled else _SECONDS
        return Job(name, part, seconds, dtype, shape, self.targets, compiled)


_HEADLINE = (
    _Row("jagged-104-d16", "jagged_attention", "all 104", rows=2048, heads=4, head_size=16, targets=(None, 1.5)),
    _Row("jagged-104-d64", "jagged_attention", "all 104", rows=2048, heads=1, head_size=64, targets=(None, 1.5)),
    _Row("pma-104", "pma_pooling", "all 104", rows=2048, heads=4, head_size=16, queries=2, targets=(3.0, 3.0)),
    _Row("jagged-tiny", "jagged_attention", "uniform 1..32", rows=65536, heads=2, head_size=32, targets=(3.0, 3.0)),
    _Row("jagged-1000-d64", "jagged_attention", "1000 at 0.5", rows=1152, heads=4, head_size=64, targets=(None, 0.8)),
    _Row("jagged-4096-d64", "jagged_attention", "all 4096", rows=16, heads=8, head_size=64, targets=(None, 0.8)),
    _Row("pma-4096", "pma_pooling", "all 4096", rows=16, heads=8, head_size=64, queries=2, targets=(3.0, 3.0)),
    _Row(
        "pma-1000-m32", "pma_pooling", "1000 at 0.5", rows=1152, heads=4, head_size=64, queries=32, targets=(3.0, 3.0)
    ),
    _Row(
        "cross-104",
        "gated_cross_attention",
        "all 104",
        rows=2048,
        heads=4,
        head_size=16,
        queries=2,
        gated=True,
        targets=(1.5, 1.5),
    ),
    _Row("pma-tiny", "pma_pooling", "uniform 1..32", rows=65536, heads=2, head_size=32, queries=2, targets=(3.0, 3.0)),
)
_REST = (
    _Row("jagged-54-d8", "jagged_attention", "all 54", rows=2048, heads=8, head_size=8, targets=(None, 1.5)),
    _Row(
        "cross-1000-m32",
        "gated_cross_attention",
        "1000 at 0.5",
        rows=1152,
        heads=4,
        head_size=64,
        queries=32,
        gated=True,
        targets=(1.5, 1.5),
    ),
    _Row(
        "cross-tiny",
        "gated_cross_attention",
        "uniform 1..32",
        rows=65536,
        heads=2,
        head_size=32,
        queries=2,
        gated=True,
        targets=(3.0, 3.0),
    ),
    _Row("jagged-1000-d128", "jagged_attention", "1000 at 1.0", rows=1152, heads=4, head_size=128, targets=(None, 0.8)),
    _Row(
        "pma-1000-m192",
        "pma_pooling",
        "1000 at 1.0",
        rows=1152,
        heads=4,
        head_size=128,
        queries=192,
        targets=(3.0, 3.0),
    ),
    _Row("ffn-256", "personalized_ffn", "all 256", rows=1152, heads=1, head_size=64),
    _Row("rotary-104", "apply_rotary", "all 104", rows=2048, heads=4, head_size=16),
)
_REAL = ("movielens", "beauty", "grocery", "diginetica")
_REAL_LENGTHS = (
    *(
        _Row(f"jagged-{name}", "jagged_attention", name, rows=4096, heads=4, head_size=32, targets=(None, 1.5))
        for name in _REAL
    ),
    *(
        _Row(f"pma-{name}", "pma_pooling", name, rows=4096, heads=4, head_size=32, queries=2, targets=(3.0, 3.0))
        for name in _REAL
    ),
)
# The rows that also have a job for compiled peers and FlexAttention.
_COMPILED = ("jagged-104-d16", "jagged-1000-d64", "pma-104", "cross-104", "rotary-104", "ffn-256")
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}
# Seconds of a job on an H200, with the start of its process and compilation from a filled cache.
_SECONDS, _CEILING_SECONDS, _COMPILED_SECONDS = 15.0, 10.0, 60.0


@dataclass(frozen=True)
class Job:
    """One measurement for a process of its own.

    Attributes:
        name: name of the job for `--only`, and the `step` of its records.
        part: 1 or 2.
        seconds: approximate time on a GPU.
        dtype: name; "" for the ceilings.
        shape: None for the ceilings.
        targets: ratios to reach to the fastest right peer, forward and forward+backward; None where there is no target.
        compiled: whether it measures the peers that `torch.compile` makes.
    """

    name: str
    part: int
    seconds: float
    dtype: str = ""
    shape: Shape | None = None
    targets: tuple[float | None, float | None] = _NO_TARGET
    compiled: bool = False

    def plain(self) -> dict[str, object]:
        """The entry of the job in `--list`."""
        fields = {"kind": "bench" if self.shape else "ceiling", "compiled": self.compiled}
        return {"name": self.name, "part": self.part, "seconds": self.seconds, **fields}


def jobs(data: Path | None = None, tiny: bool = False) -> list[Job]:
    """All jobs in order of value; `data` is a directory with length files; `tiny` is for rehearsals."""
    distributions = _distributions(data)
    chosen = [Job("ceilings", 1, _CEILING_SECONDS)]
    parts = ((1, _HEADLINE, "bfloat16"), (2, _REST, "bfloat16"), (2, _HEADLINE, "float32"))
    for part, rows, dtype in (*parts, (2, _REAL_LENGTHS, "bfloat16"), (2, _REST, "float32")):
        chosen += [row.job(distributions, part, dtype, tiny) for row in rows]
    for row in (*_HEADLINE, *_REST):
        if row.name in _COMPILED:
            chosen.append(row.job(distributions, 2, "bfloat16", tiny, compiled=True))
    return chosen


def _distributions(data: Path | None) -> Mapping[str, LengthDistribution]:
    tiny = LengthDistribution("uniform 1..32", "synthetic", lambda level: (level * 32 + 1).clamp(max=32))
    filled = [replace(shapes.filled(share, 1000), name=f"1000 at {share}") for share in (0.5, 1.0)]
    added = (*(shapes.equal(length) for length in (54, 256, 4096)), *filled, tiny)
    return {**shapes.length_distributions(data), **{distribution.name: distribution for distribution in added}}


def _rehearsed(shape: Shape) -> Shape:
    """A few short, narrow rows of the same length distribution."""
    full, limits, sizes = shape.distribution, _TINY_SIZES, shape.sizes
    clipped = replace(full, quantile=lambda level: full.quantile(level).clamp(max=_TINY_LENGTH))
    head_size = min(sizes.head_size, limits.head_size)
    narrow = replace(
        sizes,
        heads=min(sizes.heads, limits.heads),
        head_size=head_size,
        queries=min(sizes.queries, limits.queries),
        width=min(sizes.width, head_size),
    )
    return replace(shape, distribution=clipped, rows=min(shape.rows, _TINY_ROWS), sizes=narrow)
