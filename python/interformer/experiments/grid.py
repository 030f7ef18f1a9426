"""Runs jobs, a process each, several at once."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from interformer.experiments import worker
from interformer.experiments.runs import Job

# Importing PyTorch takes seconds: a server imports once, and every process is a fork of it, with memory of its own.
# The optimizer's first step imports torch._dynamo.
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = ["interformer.experiments.worker", "torch._dynamo"]
# Starting a process asks after all others: without the lock two threads may read one exit status, and one gets none.
_LOCK = threading.Lock()


class Watch:
    """What a grid tells while it goes on; the default says nothing. Called from several threads."""

    def started(self, job: Job) -> None: ...

    def told(self, job: Job, message: Mapping[str, Any]) -> None: ...

    def ended(self, job: Job, error: str | None) -> None: ...


class Grid:
    """Jobs in processes of their own, so that the memory each needs is its own.

    Args:
        root: the folder that the data's paths start from.
        at_once: how many processes.
        watch: is told of every run's beginning, progress and end.
    """

    def __init__(self, root: Path, at_once: int, watch: Watch) -> None:
        self.root, self.at_once, self.watch = root, at_once, watch
        self.processes: set[BaseProcess] = set()

    def run(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Runs every job, and returns the errors of those that failed. Where this is interrupted, so are they."""
        failed = {}
        with ThreadPoolExecutor(self.at_once) as pool:
            futures = {pool.submit(self._run_one, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    error = future.result()
                    if error is not None:
                        failed[futures[future].name] = error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.processes):
                    process.terminate()
                raise
        return failed

    def _run_one(self, job: Job) -> str | None:
        self.watch.started(job)
        process, messages = start(worker.work, job, self.root)
        self.processes.add(process)
        for message in messages:
            self.watch.told(job, message)
        with _LOCK:
            process.join()
        self.processes.discard(process)
        error = None if process.exitcode == 0 else _reason(process.exitcode, job.unfinished("log"))
        self.watch.ended(job, error)
        return error


def start(target: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Iterator[Any]]:
    """A process that calls `target(*arguments, connection)`, and what it sends there until it ends."""
    _CONTEXT.set_forkserver_preload(_PRELOAD)
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=target, args=(*arguments, theirs))
    with _LOCK:
        process.start()
    theirs.close()

    def messages() -> Iterator[Any]:
        with ours:
            while True:
                try:
                    yield ours.recv()
                except EOFError:
                    return

    return process, messages()


def _reason(status: int | None, log: Path) -> str:
    """Why a process ended: its last word, or the signal that killed it."""
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line for line in said.splitlines() if line.strip()]
    word = lines[-1] if lines and status == 1 else f"ended with status {status}"
    return f"{word} (see {log})"


def sizes_of(data: Mapping[str, Any], root: Path, *, measure_test: bool) -> dict[str, int]:
    """Clicks of each part of the data, read in a process of its own: this one stays small.

    Raises:
        ValueError: the data cannot be read, in the reader's own words.
    """
    process, messages = start(worker.look, dict(data), root, measure_test)
    answer = next(messages, {"error": "the process that reads it was killed"})
    process.join()
    if "error" in answer:
        raise ValueError(f"data: {answer['error']}")
    sizes: dict[str, int] = answer["clicks"]
    return sizes
