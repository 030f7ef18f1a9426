"""Shared parts of the GPU checks: calls of this package, the findings of a check, and the comparison of bits."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from interformer_bench.gpu_place import Place, Record
from interformer_bench.ops.spec import BenchOp
from interformer_bench.ops.table import TABLE
from torch import Tensor

from interformer_kernels import testing

DTYPES = (torch.bfloat16, torch.float32)
Inputs = Mapping[str, Any]
Results = dict[str, Tensor]
# A function of an op and its arguments that returns `(out, lse)`.
Serve = Callable[[str, Inputs], tuple[Tensor, "Tensor | None"]]
_SAME_SIZE_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COMPARED_AT_ONCE = 1 << 26  # numbers


@dataclass(frozen=True)
class Finding:
    """One result of a check: `ok` is None where it could not be run; `problem` says why, or what differed.

    Where bits differ: the `quantity`, the `index` of its first different number, the `row` of that, how many differ.
    """

    what: str
    dtype: str
    ok: bool | None
    problem: str | None = None
    quantity: str | None = None
    row: int | None = None
    index: tuple[int, ...] | None = None
    differing: int = 0

    def record(self) -> Record:
        """The finding as a record of the results."""
        return {"kind": "check", **asdict(self)}


@dataclass(frozen=True)
class CheckContext:
    """One op on one backend in one device; `serve` calls it (tests replace it by a faulty implementation)."""

    place: Place
    op: str
    backend: str
    serve: Serve

    @classmethod
    def of(cls, place: Place, op: str, backend: str) -> CheckContext:
        """The context of this package's own implementation."""
        actual_backend = place.backend(backend)
        return cls(place, op, backend, lambda op, inputs: testing.call(op, inputs, actual_backend))

    @property
    def spec(self) -> BenchOp:
        """The op's declaration."""
        return TABLE[self.op]

    def run(self, inputs: Inputs) -> Results:
        """The output, the log-sum-exp where the op has one, and every gradient."""
        return testing.evaluate(lambda: self.serve(self.op, inputs), self.op, inputs)

    def case(self, lengths: Sequence[int], **sizes: Any) -> testing.Case:
        """A call of the op on rows of these lengths, without a tail; rotary tables are as wide as a head."""
        # Scores have one number under each head: under few heads the smallest calls would have too few to be judged.
        heads = 32 if self.op == "jagged_softmax" else 4
        options: dict[str, Any] = {"heads": heads, "kv_heads": heads, "queries": 8, "head_size": 32, "value_size": 32}
        options |= sizes
        if self.spec.rotates:
            options["rope"] = options["head_size"]
        if not self.spec.attends:
            options.pop("gate", None)
        return testing.Case(self.op, "check", lengths=tuple(lengths), tail=0, **options)

    def draw(self, case: testing.Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """The inputs of a case on this place's device."""
        return testing.make_inputs(case, dtype, self.place.device, seed)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")


def random_lengths(count: int, shortest: int, longest: int, seed: int = 0) -> list[int]:
    """Random lengths from `shortest` to `longest`, all equally likely."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()


# ---------------------------------------------------------------- bits


def same_bits(
    title: str,
    dtype: torch.dtype,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    lengths: Sequence[int] = (),
) -> Finding:
    """Whether both hold the same bits; with the batch's `lengths`, the finding names the row of a difference."""
    for quantity, x in actual.items():
        y = expected[quantity]
        if x.shape != y.shape or x.dtype != y.dtype:
            problem = f"found {dtype_name(x.dtype)} {list(x.shape)}, wanted {dtype_name(y.dtype)} {list(y.shape)}"
            return Finding(title, dtype_name(dtype), False, problem, quantity)
        index, differing = difference(x, y)
        if index is not None:
            problem = f"{quantity}{list(index)} is {x[index].item():.9g}, wanted {y[index].item():.9g}"
            row = row_at(index[0], len(x), lengths) if index else None
            return Finding(title, dtype_name(dtype), False, problem, quantity, row, index, differing)
    return Finding(title, dtype_name(dtype), True)


def difference(x: Tensor, y: Tensor) -> tuple[tuple[int, ...] | None, int]:
    """The index of the first number whose bits differ, None where all are equal; and how many differ."""
    a, b = (t.detach().contiguous().view(_SAME_SIZE_INT[t.element_size()]).flatten() for t in (x, y))
    first, count = None, 0
    for start in range(0, len(a), _COMPARED_AT_ONCE):
        unequal = a[start : start + _COMPARED_AT_ONCE] != b[start : start + _COMPARED_AT_ONCE]
        unequal_count = int(unequal.count_nonzero())
        if unequal_count and first is None:
            first = start + int(unequal.to(torch.uint8).argmax())
        count += unequal_count
    if first is None:
        return None, 0
    index = []
    for size in reversed(x.shape):
        first, place = divmod(first, size)
        index.append(place)
    return tuple(reversed(index)), count


def row_at(place: int, size: int, lengths: Sequence[int]) -> int | None:
    """The row of place `place` on a first axis of `size`, which is an axis of rows or of their tokens."""
    if size == len(lengths):
        return place
    ends = list(itertools.accumulate(lengths))
    return bisect.bisect_right(ends, place) if ends and size == ends[-1] else None


# ---------------------------------------------------------------- the error budget


def within_budget(
    title: str, dtype: torch.dtype, actual: Results, eager: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> Finding:
    """Whether every quantity of 1024 numbers or more is within the budget; with fewer, chance would decide."""
    errors = {name: testing.Sums.of(x, eager[name], truth[name]) for name, x in actual.items()}
    rows = testing.judge({name: sums for name, sums in errors.items() if not 0 < sums.numbers < testing.NUMBERS})
    if not rows:
        return Finding(title, dtype_name(dtype), None, "no quantity has 1024 numbers")
    worst = max(rows, key=lambda row: row.share)
    if worst.ok:
        return Finding(title, dtype_name(dtype), True)
    return Finding(title, dtype_name(dtype), False, f"{worst.share:.2f} of the error budget", worst.quantity)


def eager_and_truth(op: str, inputs: Inputs) -> tuple[Results, Results]:
    """The results of eager PyTorch in the inputs' own dtype, and the float64 truth."""
    in_float64 = testing.cast_inputs(inputs, torch.float64)
    eager, truth = (testing.evaluate(lambda: testing.call_eager(op, x), op, x) for x in (inputs, in_float64))  # noqa: B023
    return eager, truth
