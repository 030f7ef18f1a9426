"""The jobs that are measured on a GPU, in order of value: each is one shape in one dtype, for a process of its own.

Part 1 comes first because it matters most: the machine's ceilings, and bfloat16 on the shapes of the paper's public
model, of tiny rows, of training and of long rows. Part 2 is the rest: float32, real lengths, and (on request) compiled
peers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from interformer_bench import shapes
from interformer_bench.grid import Shape
from interformer_bench.ops.call import Sizes
from interformer_bench.ops.spec import BenchOp, GpuRow
from interformer_bench.ops.table import TABLE
from interformer_bench.shapes import LengthDistribution

# Upper bounds of a rehearsal's shapes: rows, tokens of a row, and sizes.
_TINY_ROWS, _TINY_LENGTH, _TINY_SIZES = 8, 24, Sizes(heads=2, head_size=16, queries=3)

# The rank of the last row of part 1: the rows up to it are also measured in float32 before the others.
HEADLINE = 10
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
    targets: tuple[float | None, float | None] = (None, None)
    compiled: bool = False

    def plain(self) -> dict[str, object]:
        """The entry of the job in `--list`."""
        fields = {"kind": "bench" if self.shape else "ceiling", "compiled": self.compiled}
        return {"name": self.name, "part": self.part, "seconds": self.seconds, **fields}


def jobs(data: Path | None = None, tiny: bool = False) -> list[Job]:
    """All jobs in order of value; `data` is a directory with length files; `tiny` is for rehearsals."""
    distributions = _distributions(data)

    def job(op: BenchOp, row: GpuRow, part: int, dtype: str, compiled: bool = False) -> Job:
        shape = Shape(op.name, distributions[row.distribution], row.rows, op.sizes(row))
        name = f"{row.name}-{_SHORT[dtype]}{'-compiled' if compiled else ''}"
        seconds = _COMPILED_SECONDS if compiled else _SECONDS
        return Job(name, part, seconds, dtype, _rehearsed(shape) if tiny else shape, row.targets, compiled)

    rows = sorted(((op, row) for op in TABLE.values() for row in op.gpu_rows), key=lambda entry: entry[1].rank)
    headline = [(op, row) for op, row in rows if row.rank <= HEADLINE]
    rest = [(op, row) for op, row in rows if row.rank > HEADLINE]
    real = [(op, row) for op in TABLE.values() for row in op.gpu_real_rows]
    parts = ((1, headline, "bfloat16"), (2, rest, "bfloat16"), (2, headline, "float32"), (2, real, "bfloat16"))
    chosen = [Job("ceilings", 1, _CEILING_SECONDS)]
    for part, entries, dtype in (*parts, (2, rest, "float32")):
        chosen += [job(op, row, part, dtype) for op, row in entries]
    return [*chosen, *(job(op, row, 2, "bfloat16", compiled=True) for op, row in rows if row.compiled)]


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
