"""`python -m interformer_bench.gpu`: this package against its peers on one GPU, on the shapes that models have there.

Beyond the CPU's bench it measures calls replayed from a CUDA graph (no launch overhead), peak memory, and the machine's
ceilings. `--list` prints the jobs in order of value; `--only NAME` runs one of them, best in a process of its own.
Every result is appended at once as a line of JSON (`gpu_measure.py` defines the fields, `gpu_tables.py` makes tables).
With `--device cpu --tiny` the same code runs on a few short rows, and CPU kernels stand in for the GPU's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from interformer_bench.gpu_jobs import jobs
from interformer_bench.gpu_measure import measure
from interformer_bench.gpu_place import BACKENDS, Place, add_arguments, print_list, require_known_names, writer

from interformer_kernels._cli.errors import guarded


def main(arguments: list[str] | None = None) -> int:
    """Run the selected jobs; 1 where this package failed or was wrong somewhere, or the GPU was lost."""
    parser = argparse.ArgumentParser(prog="python -m interformer_bench.gpu", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--compiled", action="store_true", help="also the jobs with compiled peers, which take minutes")
    parser.add_argument("--data", type=Path, help="directory with the length files")
    chosen = parser.parse_args(arguments)
    all_jobs = jobs(chosen.data, chosen.tiny)
    if chosen.list:
        return print_list(job.plain() for job in all_jobs if chosen.compiled or not job.compiled)
    require_known_names(parser, chosen.only, [job.name for job in all_jobs])
    place = Place(chosen.device, chosen.tiny)
    write = writer(parser, chosen, place)
    right = True
    for job in all_jobs:
        selected = job.name in chosen.only if chosen.only else chosen.compiled or not job.compiled
        if selected:
            right &= measure(job, chosen.backend or BACKENDS, place, write)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(guarded(main))
