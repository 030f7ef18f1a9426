"""The lines: an op on rows of one kind, and the share of the machine's limit that is wanted there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from interformer_bench import workloads
from interformer_bench.ops.table import TABLE
from interformer_bench.run import PASSES
from interformer_bench.shapes import LengthDistribution
from interformer_bench.workloads import Inputs, Sizes
from torch import Tensor

from interformer_kernels import testing

DTYPES = ("float32", "bfloat16", "float16")
FORWARD, TRAINING = PASSES
NEARER, GEMM = "nearer limit", "GEMM"
# Inputs that rows share; all others are repeated with the rows.
_SHARED = ("seeds", "key_weight", "value_weight")
# Tokens that are drawn; larger batches repeat them.
_DRAWN_TOKENS = 1 << 16


@dataclass(frozen=True)
class Wanted:
    """The wanted shares of a limit, and speeds as multiples of another dtype's, by dtype."""

    share: Mapping[str, float] = field(default_factory=dict)
    of: str = NEARER
    speed: Mapping[str, tuple[float, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One op on rows of one kind.

    Attributes:
        rows: number of rows; 0 where the inputs should lie in memory, whatever the caches hold.
        quick: whether `--quick` measures it.
    """

    name: str
    op: str
    lengths: LengthDistribution
    sizes: Sizes
    direction: str = FORWARD
    rows: int = 0
    wanted: Wanted = field(default_factory=Wanted)
    quick: bool = False

    def batch(self, dtype: str, memory: int) -> tuple[tuple[int, ...], dict[str, Any]]:
        """The lengths of the rows and the arguments of a call; from memory their inputs take so many bytes in float32.

        Every dtype gets the same rows.
        """
        sample = self.lengths.lengths(256)
        drawn = max(1, int(_DRAWN_TOKENS / max(1.0, sum(sample) / len(sample))))
        drawn = min(drawn, self.rows or drawn)
        lengths = self.lengths.lengths(drawn)
        arguments = workloads.inputs(self.op, lengths, self.sizes, getattr(torch, dtype))
        if self.rows:
            times = math.ceil(self.rows / drawn)
        else:
            size_in_float32 = _bytes(arguments) * 4 / getattr(torch, dtype).itemsize
            times = math.ceil(memory / size_in_float32)
        return lengths * times, _repeated(arguments, lengths * times, times)


def _bytes(arguments: Inputs) -> int:
    inputs = [x for name, x in arguments.items() if isinstance(x, Tensor) and name != "grad_out"]
    return sum(x.numel() * x.element_size() for x in inputs if x.is_floating_point())


def _repeated(arguments: Inputs, lengths: Sequence[int], times: int) -> dict[str, Any]:
    """The arguments of a batch that has all rows so many times."""
    repeated = dict(arguments)
    for name, x in arguments.items():
        if name in ("offsets", "kv_offsets"):
            repeated[name] = testing.offsets_of(lengths, x.dtype)
        elif isinstance(x, Tensor) and name not in _SHARED:
            copies = x.detach().repeat(times, *[1] * (x.dim() - 1))
            repeated[name] = copies.requires_grad_(x.requires_grad)
    return repeated


def _uniform(low: int, high: int) -> LengthDistribution:
    span = high + 1 - low
    return LengthDistribution(f"uniform {low}..{high}", "synthetic", lambda level: (low + level * span).clamp(max=high))


_FLOAT16 = {"float16": (0.9, "bfloat16")}


def _of_memory(float32: float, bfloat16: float, speed: float = 0.0) -> Wanted:
    """Shares of the nearer limit; where memory bounds, float16 should be almost as fast as bfloat16."""
    faster = {"bfloat16": (speed, "float32")} if speed else {}
    return Wanted({"float32": float32, "bfloat16": bfloat16}, NEARER, {**faster, **_FLOAT16})


def _few_queries() -> list[Line]:
    """Few queries or seeds over packed keys, from memory; 4 heads of 16."""

    def line(name: str, op: str, count: int, lengths: LengthDistribution, wanted: Wanted, **more: Any) -> Line:
        return Line(name, op, lengths, Sizes(heads=4, head_size=16, queries=count), wanted=wanted, **more)

    long, middle, short = _uniform(30, 100), _uniform(10, 70), _uniform(2, 9)
    cross, pooling = "gated_cross_attention", "pma_pooling"
    counted = {1: "1 query", 2: "2 queries", 4: "4 queries"}
    wanted = {1: _of_memory(0.75, 0.65, 1.6), 2: _of_memory(0.70, 0.60), 4: _of_memory(0.50, 0.38)}
    seeds = {1: "1 seed", 2: "2 seeds", 4: "4 seeds"}
    few = [(cross, counted), (pooling, seeds)]
    tiny, back, tiny_back = _of_memory(0.65, 0.50), _of_memory(0.60, 0.55), _of_memory(0.65, 0.80)
    return [
        *(line(f"{counted[n]}, rows of 30-100", cross, n, long, wanted[n], quick=n == 1) for n in counted),
        *(
            line(f"{names[n]}, rows of 2-9", op, n, short, tiny, quick=op == cross and n == 1)
            for op, names in few
            for n in names
        ),
        *(
            line(f"{names[n]}, rows of 10-70, backward", op, n, middle, back, direction=TRAINING, quick=n == 1)
            for op, names, n in ((cross, counted, 1), (pooling, seeds, 4))
        ),
        *(
            line(f"{names[n]}, rows of 2-9, backward", op, n, short, tiny_back, direction=TRAINING, quick=n == 1)
            for op, names, n in ((cross, counted, 1), (pooling, seeds, 4))
        ),
    ]


def _attention(laws: Mapping[str, LengthDistribution]) -> list[Line]:
    """Attention inside rows."""

    def line(name: str, law: LengthDistribution, rows: int, heads: int, size: int, wanted: Wanted, **more: Any) -> Line:
        sizes = Sizes(heads=heads, head_size=size)
        return Line(f"jagged, {name}", "jagged_attention", law, sizes, FORWARD, rows, wanted, **more)

    faster = {"bfloat16": (1.4, "float32")}
    paper, middle = Wanted({"float32": 0.75}, GEMM, faster), Wanted({"float32": 0.60}, NEARER, faster)
    tiny = Wanted({"float32": 0.50, "bfloat16": 0.50}, NEARER)
    return [
        line("movielens", laws["movielens"], 512, 4, 16, paper, quick=True),
        line("news, rows of 10-70", _uniform(10, 70), 2048, 4, 16, middle),
        line("uniform 1..50", laws["uniform 1..50"], 2048, 2, 32, middle),
        line("beauty", laws["beauty"], 4096, 4, 32, tiny, quick=True),
        line("diginetica", laws["diginetica"], 8192, 4, 64, tiny),
        line("reviews", laws["grocery"], 4096, 2, 32, tiny),
    ]


def _products(laws: Mapping[str, LengthDistribution]) -> list[Line]:
    """Products with weights: those of a row, and folded ones."""

    def folded(name: str, rows: int, heads: int, count: int, share: float, quick: bool = False) -> Line:
        sizes = Sizes(heads=heads, head_size=16, queries=count, width=16 * heads)
        wanted = Wanted({"float32": share}, GEMM)
        return Line(f"folded, {name}", "pma_folded", laws[name], sizes, FORWARD, rows, wanted, quick)

    return [
        Line(
            "personalized_ffn, rows of 30-100",
            "personalized_ffn",
            _uniform(30, 100),
            Sizes(heads=1, head_size=64, width=64),
            rows=2048,
            wanted=Wanted({"float32": 0.75, "bfloat16": 0.55}, GEMM),
            quick=True,
        ),
        folded("movielens", 512, 4, 4, 0.65, quick=True),
        folded("beauty", 2048, 8, 2, 0.45),
        folded("diginetica", 4096, 4, 2, 0.35),
    ]


def lines(laws: Mapping[str, LengthDistribution]) -> list[Line]:
    """All lines, in the order of the report."""
    everything = [*_few_queries(), *_attention(laws), *_products(laws)]
    assert {line.op for line in everything} <= set(TABLE)
    return everything
