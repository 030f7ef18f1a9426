"""What is measured on a GPU: the jobs, in order of value. Each is one shape in one dtype, for a process of its own.

Part 1 is what must be known whatever else is not: the machine's ceilings, and bfloat16 on the shapes of the paper's
public model, of tiny rows, of training and of long rows. Part 2 is the rest, float32, real lengths, and (on request)
peers that are compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from interformer_bench import shapes
from interformer_bench.grid import Shape
from interformer_bench.shapes import Law
from interformer_bench.workloads import Sizes

# What a rehearsal leaves of a shape: so many rows, tokens of a row, heads, channels and queries at most.
_TINY_ROWS, _TINY_LENGTH, _TINY_SIZES = 8, 24, Sizes(heads=2, head_size=16, queries=3)

# name, op, law, rows, heads, head size, queries, gated, and the ratios that are wanted (forward, forward+backward)
_Line = tuple[str, str, str, int, int, int, int, bool, tuple[float | None, float | None]]
_NONE = (None, None)
_HEADLINE: tuple[_Line, ...] = (
    ("jagged-104-d16", "jagged_attention", "all 104", 2048, 4, 16, 1, False, (None, 1.5)),
    ("jagged-104-d64", "jagged_attention", "all 104", 2048, 1, 64, 1, False, (None, 1.5)),
    ("pma-104", "pma_pooling", "all 104", 2048, 4, 16, 2, False, (3.0, 3.0)),
    ("jagged-tiny", "jagged_attention", "uniform 1..32", 65536, 2, 32, 1, False, (3.0, 3.0)),
    ("jagged-1000-d64", "jagged_attention", "1000 at 0.5", 1152, 4, 64, 1, False, (None, 0.8)),
    ("jagged-4096-d64", "jagged_attention", "all 4096", 16, 8, 64, 1, False, (None, 0.8)),
    ("pma-4096", "pma_pooling", "all 4096", 16, 8, 64, 2, False, (3.0, 3.0)),
    ("pma-1000-m32", "pma_pooling", "1000 at 0.5", 1152, 4, 64, 32, False, (3.0, 3.0)),
    ("cross-104", "gated_cross_attention", "all 104", 2048, 4, 16, 2, True, (1.5, 1.5)),
    ("pma-tiny", "pma_pooling", "uniform 1..32", 65536, 2, 32, 2, False, (3.0, 3.0)),
)
_REST: tuple[_Line, ...] = (
    ("jagged-54-d8", "jagged_attention", "all 54", 2048, 8, 8, 1, False, (None, 1.5)),
    ("cross-1000-m32", "gated_cross_attention", "1000 at 0.5", 1152, 4, 64, 32, True, (1.5, 1.5)),
    ("cross-tiny", "gated_cross_attention", "uniform 1..32", 65536, 2, 32, 2, True, (3.0, 3.0)),
    ("jagged-1000-d128", "jagged_attention", "1000 at 1.0", 1152, 4, 128, 1, False, (None, 0.8)),
    ("pma-1000-m192", "pma_pooling", "1000 at 1.0", 1152, 4, 128, 192, False, (3.0, 3.0)),
    ("ffn-256", "personalized_ffn", "all 256", 1152, 1, 64, 1, False, _NONE),
    ("rotary-104", "apply_rotary", "all 104", 2048, 4, 16, 1, False, _NONE),
)
_REAL = ("movielens", "beauty", "grocery", "diginetica")
_REAL_LENGTHS: tuple[_Line, ...] = (
    *((f"jagged-{law}", "jagged_attention", law, 4096, 4, 32, 1, False, (None, 1.5)) for law in _REAL),
    *((f"pma-{law}", "pma_pooling", law, 4096, 4, 32, 2, False, (3.0, 3.0)) for law in _REAL),
)
# Those that compiled peers and FlexAttention are tried on.
_COMPILED = ("jagged-104-d16", "jagged-1000-d64", "pma-104", "cross-104", "rotary-104", "ffn-256")
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}
# Seconds of a job on an H200 machine, its process' start and the kernels' compiling (from a filled cache) included.
_SECONDS, _CEILING_SECONDS, _COMPILED_SECONDS = 15.0, 10.0, 60.0


@dataclass(frozen=True)
class Job:
    """One measurement for a process of its own.

    Attributes:
        name: what `--only` takes, and the `step` of its records.
        part: 1 or 2.
        seconds: about how long it takes on a GPU.
        dtype: name; "" for the ceilings.
        shape: None for the ceilings.
        wanted: ratios to the fastest right peer, forward and forward+backward; None: nothing is promised.
        compiled: it is about the peers that `torch.compile` makes.
    """

    name: str
    part: int
    seconds: float
    dtype: str = ""
    shape: Shape | None = None
    wanted: tuple[float | None, float | None] = _NONE
    compiled: bool = False

    def plain(self) -> dict[str, object]:
        """What `--list` tells."""
        about = {"kind": "bench" if self.shape else "ceiling", "compiled": self.compiled}
        return {"name": self.name, "part": self.part, "seconds": self.seconds, **about}


def jobs(data: Path | None = None, tiny: bool = False) -> list[Job]:
    """All of them, in order of value; `data` is a directory with length files; `tiny` is for rehearsals."""
    laws = _laws(data)
    found = [Job("ceilings", 1, _CEILING_SECONDS)]
    parts = ((1, _HEADLINE, "bfloat16"), (2, _REST, "bfloat16"), (2, _HEADLINE, "float32"))
    for part, lines, dtype in (*parts, (2, _REAL_LENGTHS, "bfloat16"), (2, _REST, "float32")):
        found += [_job(line, laws, part, dtype, tiny) for line in lines]
    for line in (*_HEADLINE, *_REST):
        if line[0] in _COMPILED:
            one = _job(line, laws, 2, "bfloat16", tiny)
            found.append(replace(one, name=f"{one.name}-compiled", compiled=True, seconds=_COMPILED_SECONDS))
    return found


def _laws(data: Path | None) -> Mapping[str, Law]:
    tiny = Law("uniform 1..32", "synthetic", lambda level: (level * 32 + 1).clamp(max=32))
    full = [replace(shapes.filled(share, 1000), name=f"1000 at {share}") for share in (0.5, 1.0)]
    made = (*(shapes.equal(length) for length in (54, 256, 4096)), *full, tiny)
    return {**shapes.laws(data), **{law.name: law for law in made}}


def _job(line: _Line, laws: Mapping[str, Law], part: int, dtype: str, tiny: bool) -> Job:
    name, op, law, rows, heads, head_size, queries, gated, wanted = line
    width = heads * head_size if op == "personalized_ffn" else 0
    shape = Shape(op, laws[law], rows, Sizes(heads, head_size, queries, width, gated))
    shape = _rehearsed(shape) if tiny else shape
    return Job(f"{name}-{_SHORT[dtype]}", part, _SECONDS, dtype, shape, wanted)


def _rehearsed(shape: Shape) -> Shape:
    """A few short rows of the same law, narrow."""
    law, most, sizes = shape.law, _TINY_SIZES, shape.sizes
    clipped = Law(law.name, law.source, lambda level: law.quantile(level).clamp(max=_TINY_LENGTH))
    head_size = min(sizes.head_size, most.head_size)
    narrow = replace(
        sizes,
        heads=min(sizes.heads, most.heads),
        head_size=head_size,
        queries=min(sizes.queries, most.queries),
        width=min(sizes.width, head_size),
    )
    return replace(shape, law=clipped, rows=min(shape.rows, _TINY_ROWS), sizes=narrow)
