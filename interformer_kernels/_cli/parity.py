"""`interformer-kernels parity`: every backend of this machine against the float64 truth; exit status 1 on any breach.

For other people's CI: name what you rely on (`--backend cpu --op pma_pooling --dtype float32`), and the command also
fails where a named backend cannot serve. What is not named is tried wherever it can serve.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from interformer_kernels import _backend, testing
from interformer_kernels._checks import FLOAT_DTYPES
from interformer_kernels._cli.info import devices
from interformer_kernels._cli.tables import print_table, status_line

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
    problem: str | None = None

    @property
    def share(self) -> float:
        """Error over budget: above 1 is a breach, and so are NaN errors and problems (infinite)."""
        if self.problem is not None or not math.isfinite(self.error):
            return math.inf
        if self.error == 0:
            return 0.0
        return self.error / self.budget if self.budget else math.inf

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
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every compared quantity as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print the worst case of every quantity, and return the exit status."""
    results = list(compare(arguments.op, arguments.backend, arguments.dtype, arguments.device, tell=status_line))
    if arguments.json:
        write_json(arguments.json, results)
    return show(results)


def compare(
    ops: list[str] | None = None,
    backends: list[str] | None = None,
    dtypes: list[str] | None = None,
    device: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[Result]:
    """Results of all cases of what is named; what is not named (None) is everything that can serve.

    A named backend that cannot serve any one of the ops, dtypes or devices is a breach; `tell` hears what is going on.
    """
    for op in ops or testing.OPS:
        for backend in backends or _backend.BACKENDS:
            kinds = dtypes or [name for name, dtype in _DTYPES.items() if _serves_somewhere(op, backend, dtype, device)]
            for kind in kinds or [next(iter(_DTYPES))]:
                yield from _compare_kind(op, backend, kind, device, named=backends is not None, tell=tell)
    tell("")


def _compare_kind(
    op: str, backend: str, kind: str, device: str | None, *, named: bool, tell: Callable[[str], None]
) -> Iterator[Result]:
    places = [device] if device else devices()
    reasons = {place: _backend.why_not(op, backend, place, _DTYPES[kind]) for place in places}
    served = [place for place, reason in reasons.items() if reason is None]
    if named and not served:
        why = "; ".join(f"on {place}: {reason}" for place, reason in reasons.items())
        yield Result(op, backend, kind, "/".join(places), "-", "-", problem=f"cannot serve {why}")
    for place in served:
        tell(f"{op} {backend} {kind} {place}")
        for case in testing.cases(op):
            yield from _compare_case(case, backend, kind, place)


def _compare_case(case: testing.Case, backend: str, kind: str, device: str) -> Iterator[Result]:
    where = case.op, backend, kind, device, case.name
    try:
        rows = testing.compare(case, backend, _DTYPES[kind], device)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        # A kernel that raises is a breach to report beside the others, not the end of the comparison.
        yield Result(*where, "-", problem=f"{type(error).__name__}: {error}")
        return
    for row in rows:
        yield Result(*where, row.quantity, row.error, row.budget)


def _serves_somewhere(op: str, backend: str, dtype: torch.dtype, device: str | None) -> bool:
    return any(_backend.why_not(op, backend, place, dtype) is None for place in ([device] if device else devices()))


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
    print_table("Largest error against float64, and its budget", columns, lines)
    breaches = [one for one in results if not one.ok]
    for one in breaches:
        what = one.problem or f"error {one.error:.3e}, budget {one.budget:.3e}"
        print(f"BREACH: {one.op} {one.backend} {one.dtype} {one.device}, case {one.case!r}, {one.quantity}: {what}")
    compared = sum(one.problem is None for one in results)
    print(f"{compared} quantities compared, {len(breaches)} breaches")
    return 1 if breaches or not compared else 0


def write_json(path: Path, results: list[Result]) -> None:
    """Every result; numbers that are not finite become null, as JSON has none."""
    rows = []
    for one in results:
        row = {**asdict(one), "share": one.share}
        finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
        rows.append({**finite, "ok": one.ok})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
