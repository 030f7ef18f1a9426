"""This package against its peers on the named shapes; `--out DIR` writes the report.

Torch alone is enough to measure and print; `--out` draws pictures, which needs matplotlib, and rich makes tables and
bars on a terminal. Both come with the extra `bench`: `pip install 'interformer-kernels[bench]'`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from interformer_bench import calls, curves, grid, memory, plots, progress, report, shapes, sweeps, timing, workloads
from interformer_bench import run as bench
from interformer_bench.peers import OURS
from interformer_bench.progress import Progress

from interformer_kernels import _backend
from interformer_kernels._cli.arguments import count, duration
from interformer_kernels._cli.tables import print_table
from interformer_kernels._files import want_writable, write_text

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_T = TypeVar("_T")
_EXTRA = "pip install 'interformer-kernels[bench]'"


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Which shapes, in which dtypes, on how many threads, and for how long."""
    add = parser.add_argument
    add("--op", action="append", choices=workloads.OPS, help="may be repeated; all where left out")
    add("--law", action="append", choices=list(shapes.laws()), help="may be repeated; all where left out")
    add("--data", type=Path, help="directory with the length files")
    add("--rows", type=count, help="rows of a batch, instead of each shape's own")
    add("--dtype", action="append", choices=_DTYPES, help="may be repeated; each shape's own where left out")
    add("--threads", action="append", type=count, help="of the CPU; may be repeated; 1 and 2 where left out")
    add("--seconds", type=duration, default=1.2, help="about how long each (shape, pass, threads) is timed")
    add(
        "--quick",
        action="store_true",
        help="few shapes (or those of --law), float32, 2 threads, no compiled peers",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    add_choice(parser)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--backend", choices=_backend.BACKENDS, help="of this package; the fastest where left out")
    add("--sweeps", action="store_true", help="the sweeps over length, batch and fill alone")
    add("--no-compile", action="store_true", help="without the peers that torch.compile makes")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE", help='"-" prints it')
    add("--out", type=Path, metavar="DIR", help="report.md, report.json and pictures")


def shapes_of(chosen: argparse.Namespace) -> list[grid.Shape]:
    """The shapes that were chosen."""
    return grid.shapes(shapes.laws(chosen.data), chosen.op or workloads.OPS, chosen.law, chosen.rows, chosen.quick)


def dtypes_of(chosen: argparse.Namespace) -> tuple[str, ...] | None:
    """The dtypes that were chosen; None: each shape's own."""
    return tuple(chosen.dtype or ["float32"]) if chosen.dtype or chosen.quick else None


def threads_of(chosen: argparse.Namespace) -> tuple[int, ...]:
    """The numbers of threads that were chosen."""
    return tuple(chosen.threads or ((2,) if chosen.quick else (1, 2)))


def _measure(chosen: argparse.Namespace, found: Sequence[grid.Shape], shown: Progress) -> report.Report:
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
    measured: list[bench.Measurement] = []
    swept: dict[str, list[bench.Measurement]] = {}
    peaks: list[memory.Peak] = []
    costs: list[calls.Line] = []
    whole = not chosen.quick and chosen.device == "cpu"
    try:
        if not chosen.sweeps:
            _extend(measured, bench.measure(found, settings, machine))
        if chosen.sweeps or (whole and chosen.law is None and chosen.rows is None):
            for sweep in sweeps.SWEEPS.values():
                if chosen.op is None or sweep.op in chosen.op:
                    _extend(swept.setdefault(sweep.axis, []), sweeps.measure(sweep, settings))
        if whole and not chosen.sweeps:
            why = memory.why_not()
            if why is None:
                _extend(peaks, memory.peaks(found, chosen.data, max(settings.threads), shown))
            else:
                shown.say(why)
            costs = calls.lines()
    except KeyboardInterrupt:
        shown.say("stopped: the report holds what was measured")
    return report.Report(measured, machine.rates(), peaks, costs, swept)


def _extend(found: list[_T], more: Iterable[_T]) -> None:
    """One by one, so that what is stopped leaves what it had."""
    for one in more:
        found.append(one)


def _write(chosen: argparse.Namespace, made: report.Report) -> None:
    if chosen.markdown == Path("-"):
        print(report.markdown(made))
    elif chosen.markdown:
        write_text(chosen.markdown, report.markdown(made))
    if chosen.json:
        report.write_json(chosen.json, made)
    if chosen.out:
        pictures = _draw(chosen.out, made)
        write_text(chosen.out / "report.md", report.markdown(made, pictures))
        report.write_json(chosen.out / "report.json", made)


def _draw(folder: Path, made: report.Report) -> list[str]:
    """The pictures, by name."""
    found = []
    for axis, measured in made.sweeps.items():
        found.append(f"{axis}.png")
        curves.sweep(folder / found[-1], sweeps.SWEEPS[axis], measured)
    if made.measurements:
        found += ["roofline.png", "ratios.png", "limits.png"]
        curves.roofline(folder / "roofline.png", made.measurements, made.machine)
        plots.ratios(folder / "ratios.png", made.measurements)
        plots.limits(folder / "limits.png", made.measurements, made.machine)
    return found


def _show(made: report.Report) -> None:
    for op, lines in report.by_op(made).items():
        print_table(op, report.COLUMNS, lines)
        print()
    if made.peaks:
        print_table("peak memory beyond inputs and outputs", report.MEMORY_COLUMNS, report.memory_table(made.peaks))
    if made.calls:
        print_table("the cost of a call", report.CALL_COLUMNS, made.calls)
    for axis, measured in made.sweeps.items():
        print_table(sweeps.SWEEPS[axis].title(), *report.sweep_table(sweeps.SWEEPS[axis], measured))
        print()
    machine = [report.rates(made.machine)] if made.machine else []
    print("\n".join([*machine, *report.missed(made), *report.problems(made.everything())]))


def _missing(chosen: argparse.Namespace) -> str | None:
    """What the pictures need and is not installed, found before anything is measured for them."""
    if chosen.out and importlib.util.find_spec("matplotlib") is None:
        return f"bench: --out draws pictures, which needs matplotlib: {_EXTRA}"
    return None


def run(chosen: argparse.Namespace) -> int:
    """Measure, print, write; 1 where this package itself is wrong somewhere."""
    reason = _missing(chosen)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    for target in (chosen.json, chosen.markdown, chosen.out / "report.md" if chosen.out else None):
        if target not in (None, Path("-")):
            want_writable(target)
    with progress.shown() as shown:
        if sys.stderr.isatty() and importlib.util.find_spec("rich") is None:
            shown.say(f"tables and progress are plain without rich: {_EXTRA}")
        made = _measure(chosen, shapes_of(chosen), shown)
    if chosen.markdown != Path("-"):
        _show(made)
    _write(chosen, made)
    return 1 if any(one.problem and one.runner == OURS for one in made.everything()) else 0
