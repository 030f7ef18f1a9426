"""`python -m interformer_bench.rows`: lines bound by memory or by short rows, as shares of the machine's own rates.

Shares are of a copy of as many bytes, and of matrix products, on the same threads in the same run. Lines of few queries
or seeds lie in memory: their inputs are larger than the last cache.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from interformer_bench import waiting

if TYPE_CHECKING:
    from interformer_bench.rows.lines import Line

# Products on tile units (AMX) are no limit for vector instructions: oneDNN and MKL must do without.
_NO_TILES = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512_E3"}
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}


def has_tiles() -> bool:
    """Whether the processor has AMX."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_tile" in cpuinfo.read_text()


def environment(huge_pages: bool) -> dict[str, str]:
    """The variables of a process that measures, beside `waiting.ENVIRONMENT`."""
    return {**(_NO_TILES if has_tiles() else {}), **(_HUGE_PAGES if huge_pages else {})}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m interformer_bench.rows", description=__doc__)
    add = parser.add_argument
    add("--line", action="append", metavar="TEXT", help="lines whose names contain TEXT; may be repeated; default: all")
    add("--dtype", action="append", choices=("float32", "bfloat16", "float16"), help="may be repeated; default: all")
    add("--data", type=Path, help="directory with the length files")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default: %(default)s")
    add("--seconds", type=float, help="about how long each line is timed in each dtype; default: 1.2, quick 0.4")
    add("--quick", action="store_true", help="a few lines (or those of --line), for a shorter time")
    add("--memory", type=int, metavar="MB", help="float32 inputs of lines from memory; default: 4 last caches or less")
    add("--huge-pages", action="store_true", help="ask for huge pages (THP_MEM_ALLOC_ENABLE=1)")
    add("--list", action="store_true", help="print the names of the lines")
    add("--out", type=Path, metavar="DIR", help="write rows.md and rows.json to DIR")
    return parser


def _pages() -> str:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    asked = "asked for" if os.environ.get("THP_MEM_ALLOC_ENABLE") else "not asked for"
    return f"huge pages {setting.read_text().strip() if setting.exists() else 'unknown'}, {asked}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 where a line is wrong, 2 where no line has such a name."""
    chosen = _parser().parse_args(arguments)
    if arguments is None and not chosen.list:
        waiting.restart(environment(chosen.huge_pages))
    # Torch and its libraries read the environment once, when they are imported.
    from interformer_bench import shapes
    from interformer_bench.rows import lines

    everything = lines.lines(shapes.length_distributions(chosen.data))
    named = [line for line in everything if not chosen.line or any(text in line.name for text in chosen.line)]
    if not named:
        print(f"--line must be part of one of: {'; '.join(line.name for line in everything)}", file=sys.stderr)
        return 2
    if chosen.list:
        print("\n".join(line.name for line in named))
        return 0
    return _run(chosen, [line for line in named if line.quick] if chosen.quick and not chosen.line else named)


def _run(chosen: argparse.Namespace, selected: Sequence[Line]) -> int:
    import torch
    from interformer_bench import progress, quiet, report, timing
    from interformer_bench.rows import lines, measure, tables

    from interformer_kernels._cli.tables import print_table
    from interformer_kernels._files import to_json, write_text

    seconds = chosen.seconds if chosen.seconds is not None else 0.4 if chosen.quick else 1.0
    memory = chosen.memory << 20 if chosen.memory else measure.memory_bytes() // (2 if chosen.quick else 1)
    torch.set_num_threads(chosen.threads)
    watch, machine = quiet.Watch(chosen.threads), timing.Machine()
    measured: list[measure.RowMeasurement] = []
    with progress.shown() as shown:
        dtypes = chosen.dtype or lines.DTYPES
        try:
            for row in measure.measure(selected, dtypes, memory, seconds, machine, watch, shown):
                measured.append(row)
        except KeyboardInterrupt:
            shown.say("stopped: the table holds what was measured")
    tiles = "; products on vectors (no AMX)" if has_tiles() else ""
    head = (
        f"{chosen.threads} threads, kernels: {report.isa()}, torch {torch.__version__}{tiles}. Lines from memory: "
        f"{memory >> 20} MiB of float32 inputs, last cache {measure.last_cache() >> 20} MiB; {_pages()}.\n"
        f"{waiting.described()} {quiet.described(watch.checks)}"
    )
    print(head)
    table = tables.table(selected, measured)
    print_table("rows", tables.COLUMNS, table)
    if chosen.out:
        write_text(chosen.out / "rows.md", f"{head}\n\n{report.rows(tables.COLUMNS, table)}\n")
        write_text(chosen.out / "rows.json", to_json(tables.plain(measured, watch.checks, head)))
    return 1 if any(row.problem for row in measured) else 0


if __name__ == "__main__":
    raise SystemExit(main())
