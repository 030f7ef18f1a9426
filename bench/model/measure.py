"""Time and memory of the contenders, each checked first."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from interformer.testing import random_batch
from interformer_bench import memory, shapes, timing
from interformer_bench.model.cases import SCHEMA, Case, cases
from interformer_bench.model.contenders import OURS, contenders, make, runner, why_not
from interformer_bench.progress import Progress

from interformer_kernels import testing

# Rows that every contender is checked on, none longer than that, and what is allowed to peers beyond the budget.
_CHECKED, _LONGEST, _ALLOWANCE = 16, 256, 10.0


@dataclass(frozen=True)
class Measured:
    """One contender on one case; `problem` says why it was not timed, where it was not.

    Attributes:
        peak: bytes by which a call raises the process' memory at its peak; a text that says why they are not known.
    """

    case: Case
    contender: str
    time: timing.Timing | None = None
    peak: int | str = "-"
    problem: str | None = None


def wrong(name: str, lengths: Sequence[int]) -> str | None:
    """What is wrong with a contender's logits, held against the reference in float64; None where nothing is."""
    batch = random_batch(SCHEMA, [min(length, _LONGEST) for length in lengths[:_CHECKED]])
    reference = make("reference", batch)
    exact = copy.deepcopy(reference.model).double()
    found = make(name, batch)
    with torch.no_grad():
        truth, eager, logits = exact(batch), reference.call(batch), found.call(found.batch)
    share, allowance = testing.Sums.of(logits, eager, truth).judged("logits").share, 1.0 if name == OURS else _ALLOWANCE
    return None if share <= allowance else f"wrong logits: {share:.2f} of their budget, {allowance:g} allowed"


def measure(
    chosen: Sequence[Case], data: Path | None, compile_too: bool, seconds: float, progress: Progress
) -> Iterator[Measured]:
    """Every contender on every case: interleaved times in this process, peaks in one of its own for each."""
    progress.begin("models", len(chosen))
    for case in chosen:
        progress.step(case.name)
        problems: dict[str, str | None] = {}
        runs: dict[str, timing.Run] = {}
        for name in contenders(compile_too):
            progress.doing(f"preparing {name}")
            problems[name] = _prepared(name, case, runs)
        progress.doing(f"timing {', '.join(runs)}")
        times = timing.interleaved(runs, seconds=seconds)
        runs.clear()
        torch.compiler.reset()
        for name, problem in problems.items():
            progress.doing(f"memory of {name}")
            peak = "-" if problem else memory.why_not() or _peak(case, name, data)
            yield Measured(case, name, times.get(name), peak, problem)


def _prepared(name: str, case: Case, runs: dict[str, timing.Run]) -> str | None:
    """Puts the contender among the runs, compiled where it is to be; or says why not."""
    reason = why_not(name, case)
    if reason is not None:
        return reason
    try:
        reason = wrong(name, case.lengths())
        if reason is None:
            run = runner(make(name, case.batch()), case.direction)
            run()
            runs[name] = run
    except Exception as error:
        reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return reason


def _peak(case: Case, name: str, data: Path | None) -> int | str:
    asked = json.dumps([case.name, name, str(data) if data else None, torch.get_num_threads()])
    command = [sys.executable, "-m", "interformer_bench.model.measure", asked]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **memory.ENVIRONMENT})
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or [str(done.returncode)])[-1][:200]}"
    return int(done.stdout.split()[-1])


def main(asked: str) -> None:
    """The child: prints by how many bytes the second call raises the process' memory at its peak."""
    name, contender, data, threads = json.loads(asked)
    torch.set_num_threads(threads)
    case = next(case for case in cases(shapes.laws(data)) if case.name == name)
    run = runner(make(contender, case.batch()), case.direction)
    run()
    print(memory.growth(run)[0])


if __name__ == "__main__":
    main(sys.argv[1])
