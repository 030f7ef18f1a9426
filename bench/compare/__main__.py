"""`python -m interformer_bench.compare REF`: is this tree slower than another git ref? Exit status 1 where it is.

The ref is built once, under `build/compare` (`make clean` removes it). Two processes, one for each tree, alternate call
by call on this machine. The result is printed and written to compare.md and compare.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from interformer_bench import command, progress, quiet, waiting
from interformer_bench.compare import interleaved, tree, verdicts
from interformer_bench.compare.verdicts import Comparison
from interformer_bench.progress import Progress

from interformer_kernels._cli.errors import guarded


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m interformer_bench.compare", description=__doc__)
    parser.add_argument("ref", metavar="REF", help="a commit, branch or tag")
    command.add_choice(parser)
    parser.add_argument("--out", type=Path, default=Path("bench/out"), metavar="DIR", help="default: bench/out")
    return parser


def measured(
    chosen: argparse.Namespace, trees: tuple[tree.Tree, tree.Tree], shown: Progress
) -> tuple[str, list[Comparison]]:
    """A heading, and all comparisons; differences in the first run are measured again by new processes.

    The heading says whether the machine was quiet at the start, between the runs and at the end.
    """
    jobs = interleaved.jobs(command.shapes_of(chosen), command.dtypes_of(chosen), command.threads_of(chosen))
    pair = interleaved.Pair(*trees)
    kernels = [worker.kernels for worker in pair.workers]
    heading = f"{trees[1].name} against {trees[0].name}; kernels: {' | '.join(dict.fromkeys(kernels))}"
    if kernels[0] != kernels[1]:
        heading += ": NOT THE SAME (new | old)"
    comparisons: list[Comparison] = []
    watch = quiet.Watch(max(command.threads_of(chosen)))
    try:
        for comparison in interleaved.measure(pair, jobs, chosen.seconds, "first run", shown):
            comparisons.append(comparison)
        pair.close()
        watch.busy_since_last()
        suspects = [at for at, comparison in enumerate(comparisons) if verdicts.differs(comparison)]
        if suspects:
            pair = interleaved.Pair(*trees)
            second = interleaved.measure(pair, [jobs[at] for at in suspects], chosen.seconds, "second run", shown)
            for at, repeated in zip(suspects, second, strict=True):
                comparisons[at] = dataclasses.replace(comparisons[at], second_run=(repeated.old, repeated.new))
            watch.busy_since_last()
    except KeyboardInterrupt:
        shown.say("stopped: the table holds what was measured")
    finally:
        pair.close()
    return f"{heading}. {quiet.described(watch.checks)}", comparisons


def main(arguments: list[str] | None = None) -> int:
    """Build, measure, print and write; 1 where there is a regression, 2 where nothing can be compared."""
    chosen = _parser().parse_args(arguments)
    if arguments is None:
        waiting.restart()
    try:
        new_tree = tree.current()
        with progress.shown() as shown:
            old_tree = tree.at_ref(new_tree.path, chosen.ref, shown.say)
            heading, comparisons = measured(chosen, (old_tree, new_tree), shown)
    except tree.RefusedError as error:
        print(f"bench-compare: {error}", file=sys.stderr)
        return 2
    verdicts.show(heading, comparisons)
    verdicts.write(chosen.out, heading, comparisons)
    if all(comparison.old.problem and comparison.new.problem for comparison in comparisons):
        print("bench-compare: neither tree could be timed on any line", file=sys.stderr)
        return 2
    return 1 if verdicts.failed(comparisons) else 0


if __name__ == "__main__":
    raise SystemExit(guarded(main))
