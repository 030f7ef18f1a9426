"""This package against its peers on the named shapes; `--out DIR` writes the report.

Measuring and printing need torch alone. `--out` draws pictures, which needs matplotlib, and rich shows tables and bars
on a terminal. Both come with the extra `bench`: `pip install 'interformer-kernels[bench]'`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from interformer_bench import (
    calls,
    curves,
    grid,
    memory,
    plots,
    progress,
    quiet,
    report,
    shapes,
    sweeps,
    timing,
    workloads,
)
from interformer_bench import run as bench
from interformer_bench.peers import OURS
from interformer_bench.progress import Progress

from interformer_kernels import _backend
from interformer_kernels._cli.arguments import count, duration
from interformer_kernels._cli.tables import print_table
from interformer_kernels._files import check_writable, write_text

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_T = TypeVar("_T")
_EXTRA = "pip install 'interformer-kernels[bench]'"


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The options that select shapes, dtypes, numbers of threads, and the time for each."""
    add = parser.add_argument
    add("--op", action="append", choices=workloads.OPS, help="an op; may be repeated; default: all")
    names = list(shapes.length_distributions())
    add("--law", action="append", choices=names, help="a distribution of row lengths; may be repeated; default: all")
    add("--data", type=Path, help="directory with the length files")
    add("--rows", type=count, help="number of rows of a batch, instead of each shape's own")
    add("--dtype", action="append", choices=_DTYPES, help="a dtype; may be repeated; default: each shape's own")
    add(
        "--threads",
        action="append",
        type=count,
        help="number of CPU threads, and fewer where that is faster; may be repeated; default: 1 and 2",
    )
    add("--seconds", type=duration, default=1.2, help="about how long each (shape, pass, threads) is timed")
    add(
        "--quick",
        action="store_true",
        help="a few shapes (or those of --law), float32, 2 threads, no compiled peers",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of the command."""
    add_choice(parser)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure; default: cpu")
    add("--backend", choices=_backend.BACKENDS, help="backend of this package; default: the fastest")
    add("--sweeps", action="store_true", help="only the sweeps over length, batch and fill")
    add("--no-compile", action="store_true", help="leave out the peers that torch.compile makes")
    add("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    add("--markdown", type=Path, metavar="FILE", help='write the tables to FILE; "-" prints them')
    add("--out", type=Path, metavar="DIR", help="write report.md, report.json and pictures to DIR")


def shapes_of(chosen: argparse.Namespace) -> list[grid.Shape]:
    """The selected shapes."""
    distributions = shapes.length_distributions(chosen.data)
    return grid.shapes(distributions, chosen.op or workloads.OPS, chosen.law, chosen.rows, chosen.quick)


def dtypes_of(chosen: argparse.Namespace) -> tuple[str, ...] | None:
    """The selected dtypes; None stands for each shape's own."""
    return tuple(chosen.dtype or ["float32"]) if chosen.dtype or chosen.quick else None


def threads_of(chosen: argparse.Namespace) -> tuple[int, ...]:
    """The selected numbers of threads."""
    return tuple(chosen.threads or ((2,) if chosen.quick else (1, 2)))


def _measure(chosen: argparse.Namespace, selected: Sequence[grid.Shape], shown: Progress) -> report.Report:
    settings = bench.Settings(
        dtypes=dtypes_of(chosen),
        device=chosen.device,
        threads=threads_of(chosen),
        seconds=chosen.seconds,
        compiled=not (chosen.quick or chosen.no_compile),
        backend=chosen.backend,
        progress=shown,
    )
    machine = timing.Machine(chosen.device)
    watch = quiet.Watch(max(settings.threads))
    measured: list[bench.Measurement] = []
    swept: dict[str, list[bench.Measurement]] = {}
    peaks: list[memory.Peak] = []
    costs: list[calls.CostRow] = []
    whole = not chosen.quick and chosen.device == "cpu"
    try:
        if not chosen.sweeps:
            _extend(measured, bench.measure(selected, settings, machine, watch))
        if chosen.sweeps or (whole and chosen.law is None and chosen.rows is None):
            for sweep in sweeps.SWEEPS.values():
                if chosen.op is None or sweep.op in chosen.op:
                    _extend(swept.setdefault(sweep.axis, []), sweeps.measure(sweep, settings, watch))
        if whole and not chosen.sweeps:
            reason = memory.unsupported_reason()
            if reason is None:
                _extend(peaks, memory.peaks(selected, chosen.data, max(settings.threads), shown))
            else:
                shown.say(reason)
            costs = calls.without_ratios(calls.lines(), watch.busy_since_last())
    except KeyboardInterrupt:
        shown.say("stopped: the report holds what was measured")
    return report.Report(measured, machine.rates(), peaks, costs, swept, watch.checks)


def _extend(items: list[_T], new_items: Iterable[_T]) -> None:
    """Append one by one, so that an interrupted run keeps what it has measured."""
    for item in new_items:
        items.append(item)


def _write(chosen: argparse.Namespace, results: report.Report) -> None:
    if chosen.markdown == Path("-"):
        print(report.markdown(results))
    elif chosen.markdown:
        write_text(chosen.markdown, report.markdown(results))
    if chosen.json:
        report.write_json(chosen.json, results)
    if chosen.out:
        pictures = _draw(chosen.out, results)
        write_text(chosen.out / "report.md", report.markdown(results, pictures))
        report.write_json(chosen.out / "report.json", results)


def _draw(folder: Path, results: report.Report) -> list[str]:
    """Draw the pictures; returns their file names."""
    names = []
    for axis, measured in results.sweeps.items():
        names.append(f"{axis}.png")
        curves.sweep(folder / names[-1], sweeps.SWEEPS[axis], measured)
    if results.measurements:
        names.append("roofline.png")
        curves.roofline(folder / names[-1], results.measurements, results.machine)
        lines = plots.results_of(results.measurements, results.machine)
        for dtype in dict.fromkeys(result.dtype for result in lines):
            names.append(f"speed-{dtype}.png")
            title = ", ".join([dtype, *plots.busy_note(results.measurements)])
            plots.speed(folder / names[-1], lines, dtype=dtype, title=title)
    return names


def _show(results: report.Report) -> None:
    print(report.head(results))
    for op, lines in report.by_op(results).items():
        print_table(op, report.COLUMNS, lines)
        print()
    if results.peaks:
        print_table("peak memory beyond inputs and outputs", report.MEMORY_COLUMNS, report.memory_table(results.peaks))
    if results.calls:
        print_table("the cost of a call", report.CALL_COLUMNS, results.calls)
    for axis, measured in results.sweeps.items():
        print_table(sweeps.SWEEPS[axis].title(), *report.sweep_table(sweeps.SWEEPS[axis], measured))
        print()
    machine = [report.rates(results.machine)] if results.machine else []
    print("\n".join([*machine, *report.missed(results), *report.problems(results.everything())]))


def _missing(chosen: argparse.Namespace) -> str | None:
    """The packages that the pictures need and that are not installed, checked before anything is measured."""
    if chosen.out and importlib.util.find_spec("matplotlib") is None:
        return f"bench: --out draws pictures, which needs matplotlib: {_EXTRA}"
    return None


def run(chosen: argparse.Namespace) -> int:
    """Measure, print and write; 1 where this package itself is wrong somewhere."""
    reason = _missing(chosen)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    for target in (chosen.json, chosen.markdown, chosen.out / "report.md" if chosen.out else None):
        if target not in (None, Path("-")):
            check_writable(target)
    with progress.shown() as shown:
        if sys.stderr.isatty() and importlib.util.find_spec("rich") is None:
            shown.say(f"tables and progress are plain without rich: {_EXTRA}")
        results = _measure(chosen, shapes_of(chosen), shown)
    if chosen.markdown != Path("-"):
        _show(results)
    _write(chosen, results)
    return 1 if any(result.problem and result.runner == OURS for result in results.everything()) else 0
