"""What the checks of a GPU share: how this package is called, what a check finds, and bits that are compared."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from interformer_bench.gpu_place import Place, Record
from torch import Tensor

from interformer_kernels import testing

DTYPES = (torch.bfloat16, torch.float32)
Inputs = Mapping[str, Any]
Results = dict[str, Tensor]
# From an op and its arguments to `(out, lse)`.
Serve = Callable[[str, Inputs], tuple[Tensor, "Tensor | None"]]
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 26  # numbers that are compared at once


@dataclass(frozen=True)
class Finding:
    """One thing that a check asked: `ok` is None where it could not be asked, and `problem` says why, or what differed.

    Where bits differ: `quantity`, the `index` of its first such number, the `row` that it belongs to, how many do.
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
        """As it is written."""
        return {"kind": "check", **asdict(self)}


@dataclass(frozen=True)
class Ground:
    """One op by one backend, somewhere; `serve` is how it is called (tests put a faulty one in its place)."""

    place: Place
    op: str
    backend: str
    serve: Serve

    @classmethod
    def of(cls, place: Place, op: str, backend: str) -> Ground:
        """This package itself."""
        served = place.backend(backend)
        return cls(place, op, backend, lambda op, inputs: testing.call(op, inputs, served))

    def run(self, inputs: Inputs) -> Results:
        """The output, the log-sum-exp where there is one, and every gradient."""
        return testing.evaluate(lambda: self.serve(self.op, inputs), self.op, inputs)

    def case(self, lengths: Sequence[int], **sizes: Any) -> testing.Case:
        """A call of the op on rows of these lengths, without a tail; rotary tables as wide as a head."""
        made: dict[str, Any] = {"heads": 4, "kv_heads": 4, "queries": 8, "head_size": 32, "value_size": 32, **sizes}
        if self.op == "apply_rotary":
            made["rope"] = made["head_size"]
        if self.op not in testing.OPS[:3]:
            made = {name: x for name, x in made.items() if name != "gate"}
        return testing.Case(self.op, "check", lengths=tuple(lengths), tail=0, **made)

    def draw(self, case: testing.Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """The inputs of a case, here."""
        return testing.make_inputs(case, dtype, self.place.device, seed)


def name_of(dtype: torch.dtype) -> str:
    """Without its module."""
    return str(dtype).removeprefix("torch.")


def drawn(count: int, shortest: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths, equally likely from `shortest` to `longest`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()


# ---------------------------------------------------------------- bits


def same_bits(
    what: str,
    dtype: torch.dtype,
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    lengths: Sequence[int] = (),
) -> Finding:
    """Whether both hold the same bits; `lengths` of the batch, to tell the row of a difference."""
    for quantity, x in found.items():
        y = wanted[quantity]
        if x.shape != y.shape or x.dtype != y.dtype:
            problem = f"found {name_of(x.dtype)} {list(x.shape)}, wanted {name_of(y.dtype)} {list(y.shape)}"
            return Finding(what, name_of(dtype), False, problem, quantity)
        index, differing = difference(x, y)
        if index is not None:
            problem = f"{quantity}{list(index)} is {x[index].item():.9g}, wanted {y[index].item():.9g}"
            row = row_at(index[0], len(x), lengths) if index else None
            return Finding(what, name_of(dtype), False, problem, quantity, row, index, differing)
    return Finding(what, name_of(dtype), True)


def difference(x: Tensor, y: Tensor) -> tuple[tuple[int, ...] | None, int]:
    """The index of the first number with other bits, None where there is none; and how many there are."""
    a, b = (t.detach().contiguous().view(_BITS[t.element_size()]).flatten() for t in (x, y))
    first, count = None, 0
    for start in range(0, len(a), _CHUNK):
        unequal = a[start : start + _CHUNK] != b[start : start + _CHUNK]
        here = int(unequal.count_nonzero())
        if here and first is None:
            first = start + int(unequal.to(torch.uint8).argmax())
        count += here
    if first is None:
        return None, 0
    index = []
    for size in reversed(x.shape):
        first, place = divmod(first, size)
        index.append(place)
    return tuple(reversed(index)), count


def row_at(place: int, size: int, lengths: Sequence[int]) -> int | None:
    """The row that place `place` of a first axis of `size` belongs to: an axis of rows, or of their tokens."""
    if size == len(lengths):
        return place
    ends = list(itertools.accumulate(lengths))
    return bisect.bisect_right(ends, place) if ends and size == ends[-1] else None


# ---------------------------------------------------------------- the error budget


def within_budget(
    what: str, dtype: torch.dtype, found: Results, eager: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> Finding:
    """Whether every quantity of 1024 numbers or more is within the budget; fewer would be a matter of luck."""
    errors = {name: testing.Sums.of(x, eager[name], truth[name]) for name, x in found.items()}
    rows = testing.judge({name: sums for name, sums in errors.items() if not 0 < sums.numbers < testing.NUMBERS})
    if not rows:
        return Finding(what, name_of(dtype), None, "no quantity has 1024 numbers")
    worst = max(rows, key=lambda row: row.share)
    if worst.ok:
        return Finding(what, name_of(dtype), True)
    return Finding(what, name_of(dtype), False, f"{worst.share:.2f} of the error budget", worst.quantity)


def by_definition(op: str, inputs: Inputs) -> tuple[Results, Results]:
    """Eager PyTorch in the inputs' own dtype, and the float64 truth."""
    exact = testing.cast_inputs(inputs, torch.float64)
    eager, truth = (testing.evaluate(lambda: testing.call_eager(op, x), op, x) for x in (inputs, exact))  # noqa: B023
    return eager, truth
