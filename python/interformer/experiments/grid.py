"""Run jobs in parallel, each in its own process."""

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

# Importing PyTorch takes seconds: a fork server imports it once, and every process is a fork of the server.
# torch._dynamo is preloaded because the optimizer's first step imports it.
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = ["interformer.experiments.worker", "torch._dynamo"]
# Starting a process polls all others: without the lock two threads may collect one exit status, and one gets none.
_LOCK = threading.Lock()


class Watch:
    """Callbacks of a running grid, called from several threads; the default does nothing."""

    def started(self, job: Job) -> None: ...

    def progressed(self, job: Job, message: Mapping[str, Any]) -> None: ...

    def ended(self, job: Job, error: str | None) -> None: ...


class Grid:
    """Runs jobs in separate processes, so that their peak memory is measured separately.

    Args:
        root: the folder that the data's paths are relative to.
        at_once: number of parallel processes.
        watch: callbacks for every run's start, progress and end.
    """

    def __init__(self, root: Path, at_once: int, watch: Watch) -> None:
        self.root, self.at_once, self.watch = root, at_once, watch
        self.processes: set[BaseProcess] = set()

    def run(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Run every job; returns the errors of failed ones, by name. An interrupt terminates the running processes."""
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
            self.watch.progressed(job, message)
        with _LOCK:
            process.join()
        self.processes.discard(process)
        error = None if process.exitcode == 0 else _failure_reason(process.exitcode, job.unfinished("log"))
        self.watch.ended(job, error)
        return error


def start(target: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Iterator[Any]]:
    """A process that calls `target(*arguments, connection)`, and the messages that it sends until it ends."""
    _CONTEXT.set_forkserver_preload(_PRELOAD)
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=target, args=(*arguments, sender))
    with _LOCK:
        process.start()
    sender.close()

    def messages() -> Iterator[Any]:
        with receiver:
            while True:
                try:
                    yield receiver.recv()
                except EOFError:
                    return

    return process, messages()


def _failure_reason(status: int | None, log: Path) -> str:
    """The reason why a process failed: the last line of its log, or its exit status."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    reason = lines[-1] if lines and status == 1 else f"ended with status {status}"
    return f"{reason} (see {log})"


def part_sizes(data: Mapping[str, Any], root: Path, *, measure_test: bool) -> dict[str, int]:
    """Number of clicks in each part of the data, read in a separate process to keep this one small.

    Raises:
        ValueError: the data cannot be read; with the reader's message.
    """
    process, messages = start(worker.send_sizes, dict(data), root, measure_test)
    reply = next(messages, {"error": "the process that reads it was killed"})
    process.join()
    if "error" in reply:
        raise ValueError(f"data: {reply['error']}")
    sizes: dict[str, int] = reply["clicks"]
    return sizes
