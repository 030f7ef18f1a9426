"""Two processes that alternate: the same call in one tree and in the other, never at the same time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from interformer_bench.compare.tree import Tree
from interformer_bench.compare.verdicts import MIN_SAMPLES, ComparedCase, Comparison, TreeTiming
from interformer_bench.compare.worker import DiedError, Worker
from interformer_bench.grid import Shape
from interformer_bench.progress import Progress
from interformer_bench.run import PASSES
from interformer_bench.timing import Timing

# Threads of an OpenMP library that ignores `waiting.ENVIRONMENT` spin for some milliseconds after their work.
_PAUSE = 0.02
_MAX_SAMPLES = 30


@dataclass(frozen=True)
class Job:
    """One compared case, and the message that prepares it in a process."""

    case: ComparedCase
    request: dict[str, Any]


def jobs(chosen: Sequence[Shape], dtypes: tuple[str, ...] | None, threads: tuple[int, ...]) -> list[Job]:
    """Every shape in each dtype, on each number of threads, in both passes; both trees get the same lengths."""
    shape_dtypes = [(shape, dtype) for shape in chosen for dtype in dtypes or shape.dtypes]
    all_jobs = []
    for (shape, dtype), number, direction in itertools.product(shape_dtypes, threads, PASSES):
        lengths = shape.lengths()
        description = shape.distribution.name, shape.distribution.source, shape.rows, sum(lengths), str(shape.sizes)
        call = {"op": shape.op, "lengths": lengths, "sizes": asdict(shape.sizes), "dtype": dtype}
        request = {**call, "threads": number, "direction": direction}
        all_jobs.append(Job(ComparedCase(shape.op, *description, dtype, number, direction), request))
    return all_jobs


class Pair:
    """Both processes; one that dies is replaced by a new one."""

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

    def measure(self, job: Job, seconds: float) -> tuple[TreeTiming, TreeTiming]:
        """Prepare the call in both trees, then alternate samples; a failure in one tree does not affect the other."""
        problems = [self._prepared(at, job) for at in range(2)]
        alive = [at for at in range(2) if problems[at] is None]
        samples: list[list[float]] = [[], []]
        spent, start = 0.0, time.perf_counter()
        for round_number in range(_MAX_SAMPLES):
            late = round_number > 0 and time.perf_counter() - start > 10 * seconds
            if late or (spent > seconds and round_number >= MIN_SAMPLES):
                break
            for at in alive if round_number % 2 == 0 else reversed(alive):  # the order alternates: old new, new old
                time.sleep(_PAUSE)
                try:
                    answer = self.workers[at].ask("sample")
                except DiedError as error:
                    problems[at] = self._replace_worker(at, error)
                    alive = [index for index in alive if index != at]
                    break
                samples[at].append(answer["seconds"])
                spent += answer["spent"]
        old, new = (
            TreeTiming(Timing.of(times), None) if times and problem is None else TreeTiming(None, problem)
            for times, problem in zip(samples, problems, strict=True)
        )
        return old, new

    def _prepared(self, at: int, job: Job) -> str | None:
        """The problem of the call in one of the trees, if it has one."""
        try:
            problem = self.workers[at].ask("prepare", **job.request).get("problem")
        except DiedError as error:
            return self._replace_worker(at, error)
        return None if problem is None else str(problem)

    def _replace_worker(self, at: int, error: DiedError) -> str:
        tree = self.workers[at].tree
        self.workers[at].close()
        self.workers[at] = Worker(tree)
        return str(error)


def measure(pair: Pair, chosen: Sequence[Job], seconds: float, stage: str, progress: Progress) -> Iterator[Comparison]:
    """One run over all jobs."""
    progress.begin(stage, len(chosen))
    for job in chosen:
        case = job.case
        progress.step(f"{case.op}, {case.dtype}: {case.rows} rows, {case.law}, {case.sizes}, {case.threads} threads")
        progress.doing(case.direction)
        yield Comparison(case, *pair.measure(job, seconds))
