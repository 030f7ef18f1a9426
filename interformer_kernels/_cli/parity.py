"""`interformer-kernels parity`: every backend of this machine against the float64 truth; exit status 1 on any breach.

With `--hard` also values that are extreme or not finite in one place of every input in turn: what must not notice keeps
its bits; and calls whose numbers cancel or overflow.

For other people's CI: name what you rely on (`--backend cpu --op pma_pooling --dtype float32`), and the command also
fails where a named backend cannot serve. What is not named is tried wherever it can serve.

Long comparisons can be cut into processes (`--part 2/4`), which may append to the same `--lines FILE`: what a process
had compared stands there, whatever became of it.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from interformer_kernels import _backend, testing
from interformer_kernels._checks import FLOAT_DTYPES
from interformer_kernels._cli.arguments import Part, count, part
from interformer_kernels._cli.info import devices
from interformer_kernels._cli.tables import print_table, status_line
from interformer_kernels._files import append_line, to_json, want_writable, write_text

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


@dataclass(frozen=True)
class Result:
    """One compared quantity of one case; or, with `problem`, why there was nothing to compare."""

    op: str
    backend: str
    dtype: str
    device: str
    case: str
    quantity: str
    error: float = math.nan
    budget: float = math.nan
    largest: float = 0.0
    limit: float = 0.0
    problem: str | None = None

    @property
    def share(self) -> float:
        """The larger of both errors over what they may be (`testing.Row`); infinite for problems."""
        row = testing.Row(self.quantity, self.error, self.budget, self.largest, self.limit)
        return row.share if self.problem is None else math.inf

    @property
    def ok(self) -> bool:
        """Within the budget."""
        return self.share <= 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("--backend", action="append", choices=_backend.BACKENDS, help="may be repeated")
    parser.add_argument("--dtype", action="append", choices=tuple(_DTYPES), help="may be repeated")
    parser.add_argument("--op", action="append", choices=testing.OPS, help="may be repeated")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where left out: every one there is")
    parser.add_argument(
        "--most-draws",
        type=count,
        metavar="N",
        help="no more draws of a case; quantities that they leave short of 1024 numbers are not judged",
    )
    parser.add_argument("--hard", action="store_true", help="also values that are extreme, or not finite in one place")
    parser.add_argument("--part", type=part, metavar="K/N", help="the K-th of N parts of each op's cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every compared quantity as JSON")
    parser.add_argument(
        "--lines", type=Path, metavar="FILE", help="also append every quantity, case by case, as a line of JSON"
    )
    parser.add_argument("--step", metavar="NAME", help='every line of --lines gets it as its "step"')


def run(arguments: argparse.Namespace) -> int:
    """Compare, print the worst case of every quantity, and return the exit status."""
    for file in filter(None, (arguments.json, arguments.lines)):
        want_writable(file)
    asked = Asked(arguments.op, arguments.backend, arguments.dtype, arguments.device, arguments.part)
    results = []
    for result in compare(asked, arguments.most_draws, arguments.hard, tell=status_line):
        results.append(result)
        if arguments.lines:
            append_line(arguments.lines, {"kind": "parity", "step": arguments.step, **plain(result)})
    status = show(results)
    if arguments.json:
        write_json(arguments.json, results)
    return status


class Asked(NamedTuple):
    """What is named; what is not (None) is everything that can serve. Of each op's cases only a part may be asked."""

    ops: list[str] | None = None
    backends: list[str] | None = None
    dtypes: list[str] | None = None
    device: str | None = None
    part: Part | None = None


def compare(
    asked: Asked, most_draws: int | None = None, hard: bool = False, tell: Callable[[str], None] = lambda line: None
) -> Iterator[Result]:
    """Results of all cases of what is asked.

    A named backend that cannot serve any one of the ops, dtypes or devices is a breach; `tell` hears what is going on.
    """
    ops, backends, dtypes, device, share = asked
    for op in ops or testing.OPS:
        for backend in backends or _backend.BACKENDS:
            kinds = dtypes or [name for name, dtype in _DTYPES.items() if _serves_somewhere(op, backend, dtype, device)]
            for kind in kinds or [next(iter(_DTYPES))]:
                places = [device] if device else devices()
                served, problem = _served(op, backend, kind, places)
                if problem and backends is not None:
                    yield Result(op, backend, kind, "/".join(places), "-", "-", problem=problem)
                for place in served:
                    tell(f"{op} {backend} {kind} {place}")
                    cases = list(_cases(op, most_draws, hard))
                    for case, judge in share.of(cases) if share else cases:
                        yield from _judged((op, backend, kind, place, case.name), case, judge)
    tell("")


def _served(op: str, backend: str, kind: str, places: Sequence[str]) -> tuple[list[str], str | None]:
    """The devices on which the backend can serve; and why there is none."""
    reasons = {place: _backend.unsupported_reason(op, backend, place, _DTYPES[kind]) for place in places}
    served = [place for place, reason in reasons.items() if reason is None]
    why = "; ".join(f"on {place}: {reason}" for place, reason in reasons.items())
    return served, None if served else f"cannot serve {why}"


# From a case, backend, dtype and device to what was found.
_Judge = Callable[[testing.Case, str, torch.dtype, str], list[testing.Row]]


def _cases(op: str, most_draws: int | None, hard: bool) -> Iterator[tuple[testing.Case, _Judge]]:
    """The cases of an op, each with the function that judges it."""
    for case in testing.cases(op):
        yield case, functools.partial(testing.compare, most_draws=most_draws)
    if hard:
        for case in testing.hard_value_cases(op):
            yield case, functools.partial(testing.compare_hard, most_draws=most_draws)
        for case in testing.hard_cases(op):
            yield case, _compare_planted


def _compare_planted(case: testing.Case, backend: str, dtype: torch.dtype, device: str) -> list[testing.Row]:
    """One row for each value that is planted; raises where something noticed it, or hid it, that must not."""
    inputs = testing.make_inputs(case, dtype, device)
    plants = list(testing.plants(inputs))
    if problems := testing.check_planted(case, backend, inputs, plants):
        raise AssertionError(f"{problems[0]} ({len(problems)} such places)")
    return [testing.Row(f"{plant.value} in {plant.name}", 0.0, 0.0) for plant in plants]


def _judged(where: tuple[str, str, str, str, str], case: testing.Case, judge: _Judge) -> Iterator[Result]:
    _, backend, kind, device, _ = where
    try:
        rows = judge(case, backend, _DTYPES[kind], device)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        # A kernel that raises is a breach to report beside the others, not the end of the comparison.
        yield Result(*where, "-", problem=f"{type(error).__name__}: {error}")
        return
    for row in rows:
        yield Result(*where, *row)


def _serves_somewhere(op: str, backend: str, dtype: torch.dtype, device: str | None) -> bool:
    return any(
        _backend.unsupported_reason(op, backend, place, dtype) is None for place in ([device] if device else devices())
    )


def worst(results: Iterable[Result]) -> list[Result]:
    """Of every (op, backend, dtype, device, quantity): the result nearest to its budget, or farthest beyond."""
    found: dict[tuple[str, ...], Result] = {}
    for result in results:
        key = result.op, result.backend, result.dtype, result.device, result.quantity
        if key not in found or result.share > found[key].share:
            found[key] = result
    return list(found.values())


def show(results: list[Result]) -> int:
    """Print the table and the verdict; returns the exit status: 1 on any breach, or where nothing was compared."""
    columns = ("op", "backend", "dtype", "device", "quantity", "error", "budget", "worst case", "verdict")
    lines = []
    for one in worst(results):
        numbers = ("-", "-") if one.problem else (f"{one.error:.1e}", f"{one.budget:.1e}")
        verdict = "ok" if one.ok else "BREACH"
        lines.append((one.op, one.backend, one.dtype, one.device, one.quantity, *numbers, one.case, verdict))
    print_table("Error against float64 (root mean square, relative), and its budget", columns, lines)
    breaches = [one for one in results if not one.ok]
    for one in breaches:
        errors = f"error {one.error:.3e}, budget {one.budget:.3e}; largest {one.largest:.3e}, limit {one.limit:.3e}"
        what = one.problem or errors
        print(f"BREACH: {one.op} {one.backend} {one.dtype} {one.device}, case {one.case!r}, {one.quantity}: {what}")
    compared = sum(one.problem is None for one in results)
    print(f"{compared} quantities compared, {len(breaches)} breaches")
    return 1 if breaches or not compared else 0


def write_json(path: Path, results: list[Result]) -> None:
    """Every result; numbers that are not finite become null, as JSON has none."""
    write_text(path, to_json([plain(one) for one in results]))


def plain(result: Result) -> dict[str, object]:
    """A result as JSON has it."""
    return {**asdict(result), "share": result.share, "ok": result.ok}
