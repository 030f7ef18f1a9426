"""One speed measurement after the other: this package and its peers on named shapes, every run checked first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from interformer_bench import peers, timing
from interformer_bench.shapes import Law

from interformer_kernels import _backend

PASSES = ("forward", "forward+backward")
# The rows on which a run must be right before it is timed: of the law, and empty ones among them.
_CHECKED_ROWS = 24


@dataclass(frozen=True)
class Shape:
    """One op on one batch: `rows` rows of a law's lengths, `queries` seeds or dense queries per row, H heads of D."""

    op: str
    law: Law
    rows: int
    queries: int = 2
    heads: int = 4
    head_size: int = 16

    def inputs(
        self, dtype: torch.dtype, device: str, rows: int | None = None, extra: tuple[int, ...] = ()
    ) -> peers.Inputs:
        """Arguments for `rows` rows (its own number where None) and `extra` ones."""
        sizes = {"queries": self.queries, "heads": self.heads, "kv_heads": self.heads}
        sizes |= {"head_size": self.head_size, "value_size": self.head_size}
        return peers.inputs(self.op, self.law.lengths(rows or self.rows) + extra, dtype, device, **sizes)


@dataclass(frozen=True)
class Measurement:
    """How long one runner took for one shape; `problem` says why it was not timed, where it was not."""

    op: str
    law: str
    source: str
    rows: int
    tokens: int
    longest: int
    queries: int
    heads: int
    head_size: int
    dtype: str
    device: str
    direction: str
    runner: str
    backend: str
    median: float | None
    low: float | None
    high: float | None
    samples: int
    problem: str | None = None


def default_shapes(
    laws: dict[str, Law], names: Sequence[str], ops: Sequence[str] = peers.OPS, rows: int | None = None
) -> list[Shape]:
    """The named laws for each op, on batches of `rows` rows.

    Where None, 512; fewer for long rows where work grows with the square of the length.
    """
    found = []
    for op in ops:
        for name in names:
            mean = sum(laws[name].lengths(1000)) / 1000
            usual = 512 if op != "jagged_attention" else min(512, max(16, int(16384 / max(mean, 1))))
            found.append(Shape(op, laws[name], rows or usual))
    return found


def measure(
    shapes: Sequence[Shape],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 3.0,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[Measurement]:
    """Check, then time, every runner on every shape, forward and forward+backward; `tell` hears what is going on."""
    for shape in shapes:
        tell(f"{shape.op}: {shape.rows} rows, {shape.law.name} ({shape.law.source})")
        yield from _measure_shape(shape, dtype, device, seconds)
    tell("")


def _measure_shape(shape: Shape, dtype: torch.dtype, device: str, seconds: float) -> Iterator[Measurement]:
    small = shape.inputs(dtype, device, rows=min(shape.rows, _CHECKED_ROWS), extra=(0, 1, 0))
    arguments = shape.inputs(dtype, device)
    offsets = arguments["kv_offsets" if shape.op == "gated_cross_attention" else "offsets"]
    runners = peers.candidates(shape.op)
    problems = {name: peers.check(shape.op, name, small) for name in runners}
    right = {name: peer for name, peer in runners.items() if problems[name] is None}
    for direction in PASSES:
        runs = {name: runner(shape.op, peer, arguments, direction) for name, peer in right.items()}
        taken = timing.interleaved(runs, device, seconds) if runs else {}
        for name in runners:
            time = taken.get(name)
            yield Measurement(
                op=shape.op,
                law=shape.law.name,
                source=shape.law.source,
                rows=shape.rows,
                tokens=int(offsets[-1]),
                longest=int(offsets.diff().max()),
                queries=shape.queries,
                heads=shape.heads,
                head_size=shape.head_size,
                dtype=str(dtype).removeprefix("torch."),
                device=device,
                direction=direction,
                runner=name,
                backend=_backend.choose(shape.op, device, dtype) if name == peers.OURS else "torch",
                median=time.median if time else None,
                low=time.low if time else None,
                high=time.high if time else None,
                samples=time.samples if time else 0,
                problem=problems[name],
            )


def runner(op: str, peer: peers.Peer, arguments: peers.Inputs, direction: str) -> timing.Run:
    """A run of one peer, as `timing` takes it."""
    if direction == "forward":
        return lambda: peers.forward(peer, arguments)
    return lambda: peers.forward_backward(op, peer, arguments)
