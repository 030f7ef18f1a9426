"""Two processes by turns: the same call in one tree and in the other, never at the same time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from interformer_bench.compare.tree import Tree
from interformer_bench.compare.verdicts import LEAST_SAMPLES, Duel, Line, Side
from interformer_bench.compare.worker import DiedError, Worker
from interformer_bench.grid import Shape
from interformer_bench.progress import Progress
from interformer_bench.run import PASSES
from interformer_bench.timing import Timing

# Threads of OpenMP spin for some milliseconds when their work is done: as long as that nobody's turn begins.
_REST = 0.02
_MOST_SAMPLES = 30


@dataclass(frozen=True)
class Job:
    """One line, and what a process needs to know to prepare it."""

    line: Line
    asked: dict[str, Any]


def jobs(chosen: Sequence[Shape], dtypes: tuple[str, ...] | None, threads: tuple[int, ...]) -> list[Job]:
    """Every shape in each dtype, on each number of threads, in both passes; both trees get the same lengths."""
    places = [(shape, dtype) for shape in chosen for dtype in dtypes or shape.dtypes]
    found = []
    for (shape, dtype), number, direction in itertools.product(places, threads, PASSES):
        lengths = shape.lengths()
        about = shape.law.name, shape.law.source, shape.rows, sum(lengths), str(shape.sizes)
        call = {"op": shape.op, "lengths": lengths, "sizes": asdict(shape.sizes), "dtype": dtype}
        asked = {**call, "threads": number, "direction": direction}
        found.append(Job(Line(shape.op, *about, dtype, number, direction), asked))
    return found


class Pair:
    """Both processes; one that dies is started anew."""

    def __init__(self, old: Tree, new: Tree) -> None:
        self.workers = [Worker(old)]
        try:
            self.workers.append(Worker(new))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    def measure(self, job: Job, seconds: float) -> tuple[Side, Side]:
        """Prepare the call in both, then sample by turns; what one tree cannot do does not keep the other from it."""
        problems = [self._prepared(at, job) for at in range(2)]
        playing = [at for at in range(2) if problems[at] is None]
        samples: list[list[float]] = [[], []]
        spent, start = 0.0, time.perf_counter()
        for turn in range(_MOST_SAMPLES):
            late = turn > 0 and time.perf_counter() - start > 10 * seconds
            if late or (spent > seconds and turn >= LEAST_SAMPLES):
                break
            for at in playing if turn % 2 == 0 else reversed(playing):  # neither always follows the other
                time.sleep(_REST)
                try:
                    answer = self.workers[at].ask("sample")
                except DiedError as error:
                    problems[at] = self._buried(at, error)
                    playing = [one for one in playing if one != at]
                    break
                samples[at].append(answer["seconds"])
                spent += answer["spent"]
        old, new = (
            Side(Timing.of(taken), None) if taken and problem is None else Side(None, problem)
            for taken, problem in zip(samples, problems, strict=True)
        )
        return old, new

    def _prepared(self, at: int, job: Job) -> str | None:
        """What is wrong with the call in one of the trees."""
        try:
            problem = self.workers[at].ask("prepare", **job.asked).get("problem")
        except DiedError as error:
            return self._buried(at, error)
        return None if problem is None else str(problem)

    def _buried(self, at: int, error: DiedError) -> str:
        tree = self.workers[at].tree
        self.workers[at].close()
        self.workers[at] = Worker(tree)
        return str(error)


def measure(pair: Pair, chosen: Sequence[Job], seconds: float, stage: str, progress: Progress) -> Iterator[Duel]:
    """One run over all lines."""
    progress.begin(stage, len(chosen))
    for job in chosen:
        line = job.line
        progress.step(f"{line.op}, {line.dtype}: {line.rows} rows, {line.law}, {line.sizes}, {line.threads} threads")
        progress.doing(line.direction)
        yield Duel(line, *pair.measure(job, seconds))
