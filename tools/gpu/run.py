"""Runs the steps of a report, whatever becomes of them: each has its limit, and all of them together have one."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from gpu import guard, results
from gpu.processes import End, Running
from gpu.results import CUT_OFF, MISSING, NOT_STARTED, OK, OUT_OF_TIME, ROOT

try:
    import fcntl
except ImportError:  # without POSIX a second report is not detected
    fcntl = None  # type: ignore[assignment]

LOG = "steps.log"
_LOG_BYTES = 8 << 20  # at most; output beyond is left out, but the last lines of each step are in the results
_LEAST = 3.0  # seconds; a step is not started with fewer left
_TICK = 0.1
_LINES, _WIDTH = 6, 300  # lines of a step's last output, and characters of a line


@dataclass(frozen=True)
class Step:
    """One command of a report.

    Attributes:
        limit: seconds that it may take.
        finds: it must leave a record; one that ends well and leaves none has failed.
        missing: why it cannot be run here.
        records: what its records name as their step, where that is another name; those of `backend` alone.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    finds: bool = True
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    missing: str | None = None
    records: tuple[str, ...] = ()
    backend: str | None = None


@dataclass(frozen=True)
class Stage:
    """Steps with a limit for all of them together, `workers` at a time.

    `leave` is the share of the whole report's time that must be left for what follows.
    """

    steps: Sequence[Step]
    limit: float
    workers: int = 1
    leave: float = 0.0


class Stopped(BaseException):
    """The report was sent a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class BusyError(Exception):
    """Another report writes to the same folder."""


def say(line: str) -> None:
    """Print a line at once; standard output may be closed."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


class Report:
    """A folder with results, and the runner of the steps that write there."""

    def __init__(self, folder: Path, seconds: float, show: Callable[[str], None] = say) -> None:
        self.folder, self.file = folder.resolve(), folder.resolve() / results.FILE
        self.seconds, self.end = seconds, time.monotonic() + seconds
        self.environment: dict[str, str] = dict(os.environ)
        self.show = show
        self._mark = f"{self.folder}//"
        self._run = f"{self._mark}{secrets.token_hex(4)}//"
        self._running: dict[Step, Running] = {}
        self._offsets: dict[Step, int] = {}

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, no other report writes to the folder; at the end, every process that was started is ended.

        Raises `Stopped` inside on a signal, and `BusyError` where another report has the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab") as lock, _signals():
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise BusyError(f"{self.folder}: another report writes there") from None
            guard.end_marked(self._mark)  # processes of an earlier report that was killed together with its guard
            results.mend(self.file)
            watch = subprocess.Popen(
                [sys.executable, "-S", "-I", str(Path(guard.__file__)), self._run],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                yield
            finally:
                assert watch.stdin is not None
                watch.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    watch.wait(10)

    def tries(self) -> dict[str, results.Try]:
        """The try of every step that counts, in this report or an earlier one."""
        return results.tries(results.read(self.file)[0])

    def record(self, record: results.Record) -> None:
        """Append it; a report whose disk is full goes on, and says so."""
        try:
            results.files.append_line(self.file, record)
        except OSError as error:
            self.show(f"NOT WRITTEN: {error}: {record}"[:_WIDTH])

    # ---------------------------------------------------------------- stages

    def run(self, stages: Sequence[Stage], again: bool = False) -> None:
        """Run all steps but those that are done; with `again`, these too."""
        done = set() if again else {name for name, attempt in self.tries().items() if attempt.ok}
        for stage in stages:
            steps = [step for step in stage.steps if step.name not in done]
            try:
                self._run_stage(steps, stage)
            finally:
                for step in list(self._running):
                    self._finish(step, CUT_OFF)

    def _run_stage(self, steps: Sequence[Step], stage: Stage) -> None:
        end = min(self.end - stage.leave * self.seconds, time.monotonic() + stage.limit)
        waiting = deque(steps)
        while waiting or self._running:
            while waiting and len(self._running) < stage.workers:
                step = waiting.popleft()
                seconds_left = end - time.monotonic()
                if step.missing is not None:
                    self._record_end(step, f"{MISSING}{step.missing}")
                elif seconds_left < _LEAST:
                    self._record_end(step, f"{NOT_STARTED}{OUT_OF_TIME}")
                else:
                    self._start(step, min(step.limit, seconds_left))
            self._wait()

    def _start(self, step: Step, limit: float) -> None:
        self.record({"kind": "begin", "step": step.name, "records": list(step.records), "backend": step.backend})
        self._offsets[step] = self.file.stat().st_size
        environment = {**self.environment, **step.environment}
        try:
            self._running[step] = Running(step.command, environment, f"{self._run}{step.name}", limit, ROOT)
        except OSError as error:
            self._record_end(step, f"failed: cannot be started: {error}")

    def _wait(self) -> None:
        """Wait a moment, read the steps' output, and finish those that have ended or must."""
        readable, _, _ = select.select([running for running in self._running.values() if running.talks], [], [], _TICK)
        for running in readable:
            running.listen()
        for step, running in list(self._running.items()):
            if running.has_ended():
                self._finish(step)
            elif time.monotonic() > running.end:
                self._finish(step, OUT_OF_TIME)

    def _finish(self, step: Step, reason: str = "") -> None:
        """End a step with all that it has started, for a `reason` where it has not ended by itself."""
        running = self._running.pop(step)
        end = running.finish()
        status = _status(end, reason)
        if status == OK and step.finds and not self._has_found(step):
            status = "failed: it left no results"
        self._record_end(step, status, time.monotonic() - running.began, end)

    def _has_found(self, step: Step) -> bool:
        attempt = results.Try(step.name, names=step.records, backend=step.backend)
        records, _ = results.read(self.file, self._offsets[step])
        return any(record["kind"] not in ("begin", "step") and attempt.has(record) for record in records)

    def _record_end(self, step: Step, status: str, seconds: float = 0.0, end: End | None = None) -> None:
        """Write down how a step ended, and show it."""
        output = end.output if end else ""
        last = [line.strip()[:_WIDTH] for line in output.splitlines() if line.strip()][-_LINES:]
        entry: dict[str, Any] = {"kind": "step", "step": step.name, "status": status, "seconds": round(seconds, 1)}
        if end and end.left_behind:
            entry["left_behind"] = end.left_behind
        self.record({**entry, "last": last})
        self._log(f"==== {step.name}: {status}, {seconds:.1f} s\n{output}\n")
        self.show(f"[{seconds:5.0f} s] {step.name}: {status}")

    def _log(self, text: str) -> None:
        with contextlib.suppress(OSError), open(self.folder / LOG, "a", errors="replace") as log:
            if log.tell() + len(text) < _LOG_BYTES:
                log.write(text)


def _status(end: End, reason: str) -> str:
    if end.stuck:
        return f"{reason or CUT_OFF}; it could not be killed"
    if reason and end.code is None:
        return reason
    if end.code == 0:
        return OK
    if end.code is not None and end.code < 0:
        with contextlib.suppress(ValueError):
            return f"failed: killed by {signal.Signals(-end.code).name}"
    return f"failed: exit status {end.code}"


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """`Stopped` is raised where a signal would end the process on the spot; children can be waited for."""

    def stop(number: int, frame: FrameType | None) -> None:
        for ending_number in ending:
            signal.signal(ending_number, signal.SIG_IGN)  # a second one must not disturb the end
        raise Stopped(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    before = {number: signal.getsignal(number) for number in numbers}
    ending = [
        number for number in numbers[:3] if before[number] != signal.SIG_IGN
    ]  # SIGHUP stays ignored under `nohup`
    for number in ending:
        signal.signal(number, stop)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
