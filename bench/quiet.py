"""Whether the machine is quiet enough for ratios: the processors that threads get, and the price of a parallel region.

A peer that makes many small calls suffers most from other load, so ratios on a busy machine flatter this package. They
are published only between two checks that found the machine quiet.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

# Bounds of a quiet machine: the share of wall time that the thread which got least had on a processor, and the seconds
# that a tiny parallel region on all threads takes beyond the same work on one.
MIN_SHARE, MAX_STEP = 0.9, 150e-6
# The text of a table in the place of a ratio.
NO_RATIO = "machine busy: no ratio"
_BUSY_SECONDS, _REGIONS = 0.1, 300
# A shorter measurement says nothing about what others used.
_SHORTEST = 0.2
_T = TypeVar("_T")
# Elements for each thread of a tiny region: PyTorch's grain, below which it takes fewer threads.
_GRAIN = 1 << 15
_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Quietness:
    """One check.

    Attributes:
        threads: number of threads.
        share: of the wall time, what the thread that got least had on a processor.
        stolen: share of the processors' time that the hypervisor gave to others; 0 where it is unknown.
        region: seconds of a tiny parallel region on all threads.
        single: seconds of the same work on one thread.
    """

    threads: int
    share: float
    stolen: float
    region: float
    single: float

    @property
    def busy(self) -> str | None:
        """Why the machine is not quiet, with the figures; None where it is."""
        reasons = []
        if self.share - self.stolen < MIN_SHARE:
            reasons.append(f"a thread got {self.share - self.stolen:.2f} of a processor, {MIN_SHARE:g} is quiet")
        if self.region - self.single > MAX_STEP:
            step = (self.region - self.single) * 1e6
            reasons.append(f"a parallel region costs {step:.0f} us, {MAX_STEP * 1e6:.0f} us is quiet")
        return "; ".join(reasons) or None

    def __str__(self) -> str:
        stolen = f", {self.stolen:.2f} of the processors were stolen" if self.stolen >= 0.005 else ""
        regions = f"a tiny parallel region took {self.region * 1e6:.0f} us, alone {self.single * 1e6:.0f} us"
        return f"{self.threads} threads got {self.share:.2f} of a processor each{stolen}; {regions}"


def check(threads: int) -> Quietness:
    """Measure for a tenth of a second; again where the machine seems busy, for something short may have run."""
    first = _check_once(threads)
    if first.busy is None:
        return first
    second = _check_once(threads)
    return second if second.busy is None else first


def _check_once(threads: int) -> Quietness:
    before, start = _stolen_seconds(), time.perf_counter()
    share = min(_shares(threads))
    wall = time.perf_counter() - start
    stolen = max(0.0, _stolen_seconds() - before) / (wall * (os.cpu_count() or 1))
    return Quietness(threads, share, stolen, _region(threads, threads), _region(1, threads))


class Watch:
    """The checks of a run: one at its start, and one after each shape; and what others used while calls were timed."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.checks: list[Quietness] = [check(threads)]
        self.disturbed: list[str] = []

    def during(self, measure: Callable[[], _T]) -> _T:
        """Run a measurement; processors that others used meanwhile, of those that it needs, are held against it."""
        before, own, start = _used_seconds(), sum(os.times()[:4]), time.perf_counter()
        result = measure()
        wall, used = time.perf_counter() - start, _used_seconds() - before
        others = (used - (sum(os.times()[:4]) - own)) / wall
        spare = (os.cpu_count() or 1) - self.threads
        # The system counts in hundredths of a second.
        if wall > _SHORTEST and others - spare > (1 - MIN_SHARE) * self.threads:
            self.disturbed.append(f"others used {others:.2f} processors meanwhile, {spare} were spare")
        return result

    def anew(self) -> None:
        """Check again, and forget what came since the last check, where nothing was measured."""
        self.disturbed = []
        self.checks.append(check(self.threads))

    def busy_since_last(self) -> str | None:
        """Check again; why what was measured since the last check was not on a quiet machine, None where it was."""
        before, disturbed = self.checks[-1].busy, next(iter(self.disturbed), None)
        self.disturbed = []
        self.checks.append(check(self.threads))
        return before or disturbed or self.checks[-1].busy


def described(checks: Sequence[Quietness]) -> str:
    """The checks of a run in words, for the head of its report."""
    if not checks:
        return "Whether the machine was quiet was not checked."
    busy = [single for single in checks if single.busy]
    typical = Quietness(
        checks[0].threads,
        *(
            statistics.median(getattr(single, name) for single in checks)
            for name in ("share", "stolen", "region", "single")
        ),
    )
    medians = f"medians of {len(checks)} checks: {typical}"
    if not busy:
        return f"The machine was quiet ({medians})."
    return f"THE MACHINE WAS BUSY in {len(busy)} of {len(checks)} checks, first: {busy[0].busy} ({medians})."


def _shares(threads: int) -> list[float]:
    """For each of so many threads at once that compute without memory: its time on a processor over the wall time."""
    shares = [0.0] * threads
    barrier = threading.Barrier(threads)

    def loop(index: int) -> None:
        barrier.wait()
        wall, cpu = time.perf_counter(), time.thread_time()
        while time.perf_counter() - wall < _BUSY_SECONDS:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000)  # it holds no lock of the interpreter
        shares[index] = (time.thread_time() - cpu) / (time.perf_counter() - wall)

    workers = [threading.Thread(target=loop, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return shares


def _region(threads: int, size: int) -> float:
    """Mean seconds of a region on so many threads; the mean shows waits that a median would hide."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.zeros(size * _GRAIN)
        for _ in range(10):
            x.add_(1)
        start = time.perf_counter()
        for _ in range(_REGIONS):
            x.add_(1)
        return (time.perf_counter() - start) / _REGIONS
    finally:
        torch.set_num_threads(before)


def _stolen_seconds() -> float:
    """Seconds that the hypervisor has taken from all processors."""
    return _processor_seconds()[7]


def _used_seconds() -> float:
    """Seconds that anything has run on all processors, and those that the hypervisor has taken."""
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = _processor_seconds()
    return user + nice + system + interrupts + soft_interrupts + stolen


def _processor_seconds() -> list[float]:
    """The first eight figures of Linux's account of all processors; zeros where there is none."""
    try:
        fields = _STAT.read_text().splitlines()[0].split()
        return [int(field) / os.sysconf("SC_CLK_TCK") for field in fields[1:9]]
    except (OSError, ValueError, IndexError):
        return [0.0] * 8
