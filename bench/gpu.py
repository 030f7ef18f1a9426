"""`python -m interformer_bench.gpu`: this package against its peers on one GPU, on the shapes that models have there.

Beside what the bench of the CPU measures: calls replayed from a CUDA graph (no cost of launching), peak memory, and
the machine's ceilings. `--list` tells the jobs, in order of value; `--only NAME` does one of them, best in a process of
its own; every result is a line of JSON at once (`gpu_measure.py` says what is in it, `gpu_tables.py` makes tables).
With `--device cpu --tiny` the same code runs on a few short rows with the CPU's kernels in the place of the GPU's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from interformer_bench.gpu_jobs import jobs
from interformer_bench.gpu_measure import measure
from interformer_bench.gpu_place import BACKENDS, Place, add_arguments, list_them, want_names, writer

from interformer_kernels._cli.errors import guarded


def main(arguments: list[str] | None = None) -> int:
    """Do the jobs that were chosen; 1 where this package failed or was wrong somewhere, or the GPU was lost."""
    parser = argparse.ArgumentParser(prog="python -m interformer_bench.gpu", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--compiled", action="store_true", help="also the jobs of compiled peers, which take minutes")
    parser.add_argument("--data", type=Path, help="directory with the length files")
    chosen = parser.parse_args(arguments)
    known = jobs(chosen.data, chosen.tiny)
    if chosen.list:
        return list_them(job.plain() for job in known if chosen.compiled or not job.compiled)
    want_names(parser, chosen.only, [job.name for job in known])
    place = Place(chosen.device, chosen.tiny)
    write = writer(parser, chosen, place)
    right = True
    for job in known:
        wanted = job.name in chosen.only if chosen.only else chosen.compiled or not job.compiled
        if wanted:
            right &= measure(job, chosen.backend or BACKENDS, place, write)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(guarded(main))
