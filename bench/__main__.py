"""`python -m interformer_bench`: this package against its peers on the named shapes; `--out DIR` writes the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from interformer_bench import calls, grid, memory, plots, progress, report, run, shapes, timing, workloads
from interformer_bench.peers import OURS
from interformer_bench.progress import Progress

from interformer_kernels import _backend
from interformer_kernels._cli.tables import print_table

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m interformer_bench", description=__doc__)
    add = parser.add_argument
    add("--op", action="append", choices=workloads.OPS, help="may be repeated; all where left out")
    add("--law", action="append", choices=list(shapes.laws()), help="may be repeated; all where left out")
    add("--data", type=Path, help="directory with the length files")
    add("--rows", type=int, help="rows of a batch, instead of each shape's own")
    add("--dtype", action="append", choices=_DTYPES, help="may be repeated; each shape's own where left out")
    add("--threads", action="append", type=int, help="of the CPU; may be repeated; 1 and 2 where left out")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--backend", choices=_backend.BACKENDS, help="of this package; the fastest where left out")
    add("--seconds", type=float, default=1.2, help="about how long each (shape, pass, threads) is timed")
    add("--quick", action="store_true", help="few shapes, float32, 2 threads, no compiled peers, no memory")
    add("--no-compile", action="store_true", help="without the peers that torch.compile makes")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE", help='"-" prints it')
    add("--out", type=Path, metavar="DIR", help="report.md, report.json and pictures")
    return parser


def _measure(chosen: argparse.Namespace, found: Sequence[grid.Shape], shown: Progress) -> report.Report:
    settings = run.Settings(
        dtypes=tuple(chosen.dtype or ["float32"]) if chosen.dtype or chosen.quick else None,
        device=chosen.device,
        threads=tuple(chosen.threads or ((2,) if chosen.quick else (1, 2))),
        seconds=chosen.seconds,
        compiled=not (chosen.quick or chosen.no_compile),
        backend=chosen.backend,
        progress=shown,
    )
    machine = timing.Machine(chosen.device)
    measured: list[run.Measurement] = []
    stopped = False
    try:
        for one in run.measure(found, settings, machine):
            measured.append(one)
    except KeyboardInterrupt:
        stopped = True
        shown.say("stopped: the report holds what was measured")
    if stopped or chosen.quick or chosen.device != "cpu":
        return report.Report(measured, machine.rates())
    why = memory.why_not()
    if why is not None:
        shown.say(why)
    peaks = [] if why is not None else list(memory.peaks(found, chosen.data, max(settings.threads), shown))
    return report.Report(measured, machine.rates(), peaks, calls.lines())


def _write(chosen: argparse.Namespace, made: report.Report) -> None:
    if chosen.markdown == Path("-"):
        print(report.markdown(made))
    elif chosen.markdown:
        chosen.markdown.parent.mkdir(parents=True, exist_ok=True)
        chosen.markdown.write_text(report.markdown(made))
    if chosen.json:
        report.write_json(chosen.json, made)
    if chosen.out:
        plots.ratios(chosen.out / "ratios.png", made.measurements)
        plots.limits(chosen.out / "limits.png", made.measurements, made.machine)
        (chosen.out / "report.md").write_text(report.markdown(made, ("ratios.png", "limits.png")))
        report.write_json(chosen.out / "report.json", made)


def _show(made: report.Report) -> None:
    for op, lines in report.by_op(made).items():
        print_table(op, report.COLUMNS, lines)
        print()
    if made.peaks:
        print_table("peak memory beyond inputs and outputs", report.MEMORY_COLUMNS, report.memory_table(made.peaks))
    if made.calls:
        print_table("the cost of a call", report.CALL_COLUMNS, made.calls)
    print("\n".join([report.rates(made.machine), *report.missed(made), *report.problems(made.measurements)]))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 where this package itself is wrong somewhere."""
    chosen = _parser().parse_args(arguments)
    found = grid.shapes(shapes.laws(chosen.data), chosen.op or workloads.OPS, chosen.law, chosen.rows, chosen.quick)
    with progress.shown() as shown:
        made = _measure(chosen, found, shown)
    if chosen.markdown != Path("-"):
        _show(made)
    _write(chosen, made)
    return 1 if any(one.problem and one.runner == OURS for one in made.measurements) else 0


if __name__ == "__main__":
    raise SystemExit(main())
