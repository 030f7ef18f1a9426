"""Several runs of the bench as one table whose rows give the range of their ratios.

`python -m interformer_bench.ranges FIRST/report.md SECOND/report.md --out FILE.md`. A row is that of the run with the
smallest ratio. Where the largest is more than 15 % above it, the ratio reads "5.04 to 6.81x"; pictures and readers of
tables then take the smaller one. A run that met a busy machine on a row does not count there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from interformer_bench.report import COLUMNS, rows
from interformer_bench.result_tables import ratios, read_lines

from interformer_kernels._files import write_text

AGREE = 0.15
_KEY = COLUMNS[:6]
Line = Mapping[str, str]


def merged(runs: Sequence[Sequence[tuple[str, Line]]]) -> tuple[dict[str, list[Line]], list[str]]:
    """The lines of each op, in the order of the first run, and those that were quiet in fewer runs than the others.

    Args:
        runs: of each run, its ops and lines (`result_tables.read_lines`).
    """
    by_key: dict[tuple[str, ...], list[Line]] = {}
    for run in runs:
        for op, line in run:
            by_key.setdefault((op, *(line[name] for name in _KEY)), []).append(line)
    tables: dict[str, list[Line]] = {}
    fewer = []
    for (op, lengths, shape, _, _, _, direction), lines in by_key.items():
        quiet = sorted((line for line in lines if ratios(line["ratio"])), key=lambda line: ratios(line["ratio"]))
        tables.setdefault(op, []).append(_with_range(quiet) if quiet else lines[0])
        if len(quiet) < len(runs):
            fewer.append(f"{op}, {lengths}, {shape}, {direction}: {len(quiet)} of {len(runs)}")
    return tables, fewer


def _with_range(lines: Sequence[Line]) -> Line:
    """The line with the smallest ratio; `lines` are in the order of their ratios."""
    low, high = ratios(lines[0]["ratio"])[0], ratios(lines[-1]["ratio"])[-1]
    if high <= (1 + AGREE) * low:
        return lines[0]
    return {**lines[0], "ratio": f"{low:.2f} to {high:.2f}x"}


def markdown(paths: Sequence[Path]) -> str:
    """The merged tables in Markdown, with the head of each run."""
    tables, fewer = merged([read_lines(path) for path in paths])
    heads = [path.read_text(encoding="utf-8").partition("\n## ")[0].strip() for path in paths]
    parts = [f"Run {number}: {head}" for number, head in enumerate(heads, 1)]
    if fewer:
        parts += ["Rows that were quiet in fewer runs:", "\n".join(f"- {row}" for row in fewer)]
    for op, lines in tables.items():
        parts += [f"## {op}", rows(COLUMNS, ([line[name] for name in COLUMNS] for line in lines))]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge reports of the same shapes."""
    parser = argparse.ArgumentParser(prog="python -m interformer_bench.ranges", description=main.__doc__)
    parser.add_argument("reports", nargs="+", type=Path, help="report.md of each run, in order")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    options = parser.parse_args(arguments)
    write_text(options.out, markdown(options.reports))


if __name__ == "__main__":
    main()
