"""`interformer-kernels parity`: compares every backend of this machine with float64; exit status 1 on any breach.

`--hard` adds extreme and non-finite values, planted at one element of each input at a time (outputs that do not depend
on the element must keep their bits), and calls whose numbers cancel or overflow.

In your own CI, name the configuration that you rely on (`--backend cpu --op pma_pooling --dtype float32`): the command
then also fails if a named backend cannot serve. Backends that are not named are tested wherever they can serve.

A long comparison can be divided among processes (`--part 2/4`), which may append to the same `--lines FILE`: results
of a process that was killed remain there.
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
from interformer_kernels._files import append_line, check_writable, to_json, write_text

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


@dataclass(frozen=True)
class Result:
    """One compared quantity of one case; or, with `problem`, the reason why nothing was compared."""

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
        """The larger of both errors relative to its limit (`testing.Row`); infinite for problems."""
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
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: every one of this machine")
    parser.add_argument(
        "--most-draws",
        type=count,
        metavar="N",
        help="at most N draws of a case; quantities with fewer than 1024 numbers are then not judged",
    )
    parser.add_argument("--hard", action="store_true", help="also extreme values, and non-finite values in one element")
    parser.add_argument("--part", type=part, metavar="K/N", help="the K-th of N parts of each op's cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every compared quantity as JSON")
    parser.add_argument(
        "--lines", type=Path, metavar="FILE", help="also append every quantity, case by case, as a line of JSON"
    )
    parser.add_argument("--step", metavar="NAME", help='the "step" of every line of --lines')


def run(arguments: argparse.Namespace) -> int:
    """Compare, print the worst case of every quantity, and return the exit status."""
    for file in filter(None, (arguments.json, arguments.lines)):
        check_writable(file)
    selection = Selection(arguments.op, arguments.backend, arguments.dtype, arguments.device, arguments.part)
    results = []
    for result in compare(selection, arguments.most_draws, arguments.hard, log=status_line):
        results.append(result)
        if arguments.lines:
            append_line(arguments.lines, {"kind": "parity", "step": arguments.step, **plain(result)})
    status = show(results)
    if arguments.json:
        write_json(arguments.json, results)
    return status


class Selection(NamedTuple):
    """The named ops, backends, dtypes and device; None means all that can serve. `part` restricts each op's cases."""

    ops: list[str] | None = None
    backends: list[str] | None = None
    dtypes: list[str] | None = None
    device: str | None = None
    part: Part | None = None


def compare(
    selection: Selection,
    most_draws: int | None = None,
    hard: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Iterator[Result]:
    """Results of all cases of the selection.

    A named backend that cannot serve one of the ops, dtypes or devices is a breach. `log` gets lines of progress.
    """
    ops, backends, dtypes, device, part = selection
    for op in ops or testing.OPS:
        for backend in backends or _backend.BACKENDS:
            kinds = dtypes or [name for name, dtype in _DTYPES.items() if _serves_somewhere(op, backend, dtype, device)]
            for kind in kinds or [next(iter(_DTYPES))]:
                candidates = [device] if device else devices()
                served, problem = _served(op, backend, kind, candidates)
                if problem and backends is not None:
                    yield Result(op, backend, kind, "/".join(candidates), "-", "-", problem=problem)
                for name in served:
                    log(f"{op} {backend} {kind} {name}")
                    cases = list(_cases(op, most_draws, hard))
                    for case, judge in part.select(cases) if part else cases:
                        yield from _judged((op, backend, kind, name, case.name), case, judge)
    log("")


def serving() -> list[str]:
    """The backends that can serve attention on a device of this machine; the reference is the first."""
    return [name for name in _backend.BACKENDS if _serves_somewhere(testing.OPS[0], name, torch.float32, None)]


def _served(op: str, backend: str, kind: str, candidates: Sequence[str]) -> tuple[list[str], str | None]:
    """The devices on which the backend can serve; and the reason if there is none."""
    reasons = {device: _backend.unsupported_reason(op, backend, device, _DTYPES[kind]) for device in candidates}
    served = [device for device, reason in reasons.items() if reason is None]
    reason = "; ".join(f"on {device}: {reason}" for device, reason in reasons.items())
    return served, None if served else f"cannot serve {reason}"


# Maps a case, backend, dtype and device to rows of errors and budgets.
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
    """One row for each planted value; raises if it changed independent outputs, or did not reach dependent ones."""
    inputs = testing.make_inputs(case, dtype, device)
    plants = list(testing.plants(inputs))
    if problems := testing.check_planted(case, backend, inputs, plants):
        raise AssertionError(f"{problems[0]} ({len(problems)} such places)")
    return [testing.Row(f"{plant.value} in {plant.name}", 0.0, 0.0) for plant in plants]


def _judged(key: tuple[str, str, str, str, str], case: testing.Case, judge: _Judge) -> Iterator[Result]:
    _, backend, kind, device, _ = key
    try:
        rows = judge(case, backend, _DTYPES[kind], device)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        # A kernel that raises is reported as a breach beside the others, and the comparison continues.
        yield Result(*key, "-", problem=f"{type(error).__name__}: {error}")
        return
    for row in rows:
        yield Result(*key, *row)


def _serves_somewhere(op: str, backend: str, dtype: torch.dtype, device: str | None) -> bool:
    candidates = [device] if device else devices()
    return any(_backend.unsupported_reason(op, backend, name, dtype) is None for name in candidates)


def worst(results: Iterable[Result]) -> list[Result]:
    """The result with the largest share of its budget, for each (op, backend, dtype, device, quantity)."""
    by_key: dict[tuple[str, ...], Result] = {}
    for result in results:
        key = result.op, result.backend, result.dtype, result.device, result.quantity
        if key not in by_key or result.share > by_key[key].share:
            by_key[key] = result
    return list(by_key.values())


def show(results: list[Result]) -> int:
    """Print the table and the verdict; returns the exit status: 1 on any breach, or if nothing was compared."""
    columns = ("op", "backend", "dtype", "device", "quantity", "error", "budget", "worst case", "verdict")
    lines = []
    for r in worst(results):
        numbers = ("-", "-") if r.problem else (f"{r.error:.1e}", f"{r.budget:.1e}")
        verdict = "ok" if r.ok else "BREACH"
        lines.append((r.op, r.backend, r.dtype, r.device, r.quantity, *numbers, r.case, verdict))
    print_table("Error against float64 (root mean square, relative), and its budget", columns, lines)
    breaches = [result for result in results if not result.ok]
    for r in breaches:
        errors = f"error {r.error:.3e}, budget {r.budget:.3e}; largest {r.largest:.3e}, limit {r.limit:.3e}"
        print(f"BREACH: {r.op} {r.backend} {r.dtype} {r.device}, case {r.case!r}, {r.quantity}: {r.problem or errors}")
    compared = sum(result.problem is None for result in results)
    print(f"{compared} quantities compared, {len(breaches)} breaches")
    return 1 if breaches or not compared else 0


def write_json(path: Path, results: list[Result]) -> None:
    """Write every result; numbers that are not finite become null, since JSON has none."""
    write_text(path, to_json([plain(result) for result in results]))


def plain(result: Result) -> dict[str, object]:
    """A result as a dictionary for JSON."""
    return {**asdict(result), "share": result.share, "ok": result.ok}
