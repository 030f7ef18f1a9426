"""`python -m interformer_bench.model`: InterFormer on these kernels against the same model on padded rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from interformer_bench import progress, quiet, shapes, waiting
from interformer_bench.model import measure, profiles, report
from interformer_bench.model.cases import Case, cases
from interformer_bench.model.contenders import OURS, contenders

from interformer_kernels._cli.arguments import count, duration
from interformer_kernels._cli.errors import guarded
from interformer_kernels._cli.tables import print_table
from interformer_kernels._files import write_text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m interformer_bench.model", description=__doc__)
    add = parser.add_argument
    add("--case", action="append", metavar="TEXT", help="cases whose names contain TEXT; may be repeated; default: all")
    add("--data", type=Path, help="directory with the length files")
    add("--threads", type=count, default=2, help="number of CPU threads; default: 2")
    add("--seconds", type=duration, default=20.0, help="about how long each case is timed")
    add("--no-compile", action="store_true", help="leave out the models that torch.compile makes")
    add("--profile", action="store_true", help="show where the time goes, instead of how long it takes")
    add("--list", action="store_true", help="print the names of the cases")
    add("--out", type=Path, metavar="DIR", help="write model.md and model.json to DIR")
    return parser


def _profile(chosen: Sequence[Case], compile_too: bool) -> None:
    for case in chosen:
        for name in contenders(compile_too):
            print_table(f"{case.name}: {name}", profiles.COLUMNS, profiles.table(case, name))
            print()


def _chosen(texts: Sequence[str] | None, all_cases: Sequence[Case]) -> list[Case]:
    return [case for case in all_cases if not texts or any(text in case.name for text in texts)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 where our own model is wrong somewhere, 2 where no case has such a name."""
    options = _parser().parse_args(arguments)
    if arguments is None:
        waiting.restart()
    all_cases = cases(shapes.length_distributions(options.data))
    chosen = _chosen(options.case, all_cases)
    if not chosen:
        print(f"--case must be part of one of: {'; '.join(case.name for case in all_cases)}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    torch.set_num_threads(options.threads)
    if options.profile:
        _profile(chosen, not options.no_compile)
        return 0
    watch = quiet.Watch(options.threads)
    with progress.shown() as shown:
        measured = list(measure.measure(chosen, options.data, not options.no_compile, options.seconds, shown, watch))
    head = report.head(watch.checks)
    print(head)
    print_table("whole models", report.COLUMNS, report.table(measured))
    if options.out:
        write_text(options.out / "model.md", report.markdown(measured, head))
        report.write_json(options.out / "model.json", measured)
    return 1 if any(result.problem and result.contender == OURS for result in measured) else 0


if __name__ == "__main__":
    raise SystemExit(guarded(main))
