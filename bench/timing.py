"""Timing that stands comparison: interleaved runs, medians with spread, and the machine's own rates in the same run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: the median, and the quartiles around it, of `samples` samples."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """From single measurements."""
        if len(seconds) < 2:
            return cls(seconds[0], seconds[0], seconds[0], len(seconds))
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


@dataclass(frozen=True)
class Machine:
    """What the machine does in this process: matrix products (FLOP/s), copies (bytes/s, both ways), on CPU threads."""

    gemm: float
    copy: float
    threads: int


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def once(run: Run, device: str, repeats: int = 1) -> float:
    """Seconds of one run, averaged over `repeats` in a row."""
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait(device)
    return (time.perf_counter() - start) / repeats


def interleaved(
    runs: Mapping[str, Run], device: str = "cpu", seconds: float = 3.0, least: int = 3, most: int = 50
) -> dict[str, Timing]:
    """Time the runs by turns, so that whatever else the machine does falls on all alike.

    Args:
        runs: by name; each is called before it is timed.
        device: "cpu" or "cuda".
        seconds: about how long all of it may take: `least` rounds are made nevertheless, unless they take ten times as
            long (one round always is), and never more than `most`.

    Runs faster than a millisecond are repeated within a sample, so that the clock does not show.
    """
    repeats = dict.fromkeys(runs, 1)
    for name, run in runs.items():
        if once(run, device) < 0.1:  # the first call is slower than the others: a slow one is not made twice
            repeats[name] = max(1, math.ceil(1e-3 / once(run, device)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for turn in range(most):
        if turn and time.perf_counter() - start > (seconds if turn >= least else 10 * seconds):
            break
        for name, run in runs.items():
            samples[name].append(once(run, device, repeats[name]))
    return {name: Timing.of(taken) for name, taken in samples.items()}


def machine(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Machine:
    """Best of five: a product of two 2048 x 2048 matrices, and a copy of 256 MiB."""
    size, bytes_ = 2048, 256 * 2**20
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    source = torch.ones(bytes_, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = (min(once(run, device) for _ in range(5)) for run in (lambda: a @ b, lambda: target.copy_(source)))
    return Machine(2 * size**3 / product, 2 * bytes_ / copy, torch.get_num_threads())
