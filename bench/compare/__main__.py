"""`python -m interformer_bench.compare REF`: is this tree slower than another git ref? Exit status 1 where it is.

The ref is built under `build/compare` (once; `make clean` removes it). Two processes, one for each tree, take turns
call by call on this machine. Written: compare.md and compare.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from interformer_bench import command, progress
from interformer_bench.compare import tree, turns, verdicts
from interformer_bench.compare.verdicts import Duel
from interformer_bench.progress import Progress

from interformer_kernels._cli.errors import guarded


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m interformer_bench.compare", description=__doc__)
    parser.add_argument("ref", metavar="REF", help="a commit, branch or tag")
    command.add_choice(parser)
    parser.add_argument("--out", type=Path, default=Path("bench/out"), metavar="DIR", help="bench/out where left out")
    return parser


def measured(chosen: argparse.Namespace, trees: tuple[tree.Tree, tree.Tree], shown: Progress) -> tuple[str, list[Duel]]:
    """A heading, and every line; what the first run saw differ is seen once more, by new processes."""
    jobs = turns.jobs(command.shapes_of(chosen), command.dtypes_of(chosen), command.threads_of(chosen))
    pair = turns.Pair(*trees)
    kernels = [worker.kernels for worker in pair.workers]
    heading = f"{trees[1].name} against {trees[0].name}; kernels: {' | '.join(dict.fromkeys(kernels))}"
    if kernels[0] != kernels[1]:
        heading += ": NOT THE SAME (new | old)"
    found: list[Duel] = []
    try:
        for duel in turns.measure(pair, jobs, chosen.seconds, "first run", shown):
            found.append(duel)
        pair.close()
        suspects = [at for at, duel in enumerate(found) if verdicts.differs(duel)]
        if suspects:
            pair = turns.Pair(*trees)
            second = turns.measure(pair, [jobs[at] for at in suspects], chosen.seconds, "second run", shown)
            for at, again in zip(suspects, second, strict=True):
                found[at] = dataclasses.replace(found[at], again=(again.old, again.new))
    except KeyboardInterrupt:
        shown.say("stopped: shown is what was measured")
    finally:
        pair.close()
    return heading, found


def main(arguments: list[str] | None = None) -> int:
    """Build, measure, print, write; 1 where there is a regression, 2 where nothing can be compared."""
    chosen = _parser().parse_args(arguments)
    try:
        here = tree.this()
        with progress.shown() as shown:
            there = tree.other(here.path, chosen.ref, shown.say)
            heading, duels = measured(chosen, (there, here), shown)
    except tree.RefusedError as error:
        print(f"bench-compare: {error}", file=sys.stderr)
        return 2
    verdicts.show(heading, duels)
    verdicts.write(chosen.out, heading, duels)
    if all(duel.old.problem and duel.new.problem for duel in duels):
        print("bench-compare: neither tree could be timed on any line", file=sys.stderr)
        return 2
    return 1 if verdicts.failed(duels) else 0


if __name__ == "__main__":
    raise SystemExit(guarded(main))
