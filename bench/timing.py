"""Timing that stands comparison: interleaved runs, medians with spread, and the machine's own rates in the same run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], object]
# A run more than so many times slower than the fastest is nobody's rival: one sample of it is enough.
_HOPELESS = 3.0
# The matrices of a GEMM, smaller where the machine would take longer than this for one; and the bytes of a copy.
_GEMM_SIZES, _GEMM_SECONDS = (2048, 1024, 512, 256), 3.0
_COPY_BYTES = 256 * 2**20
# On a GPU both are larger, and so many follow one another, or launching and waiting would be a part of their time. They
# are smaller by halves where its memory is short.
_GPU_GEMM_SIZES, _GPU_COPY_BYTES, _GPU_ROW = (8192, 4096, 2048, 1024, 512, 256), 4 * 2**30, 10
# What is copied repeats after so many random bytes.
_RANDOM_BYTES = 2**20


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


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def once(run: Run, device: str = "cpu", repeats: int = 1) -> float:
    """Seconds of one run, averaged over `repeats` in a row.

    On a GPU by events of its own, so that the last wait does not count: what the device works, or what it waits for the
    host between the first launch and the last.
    """
    wait(device)
    if device == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def quickest(run: Run, device: str = "cpu", calls: int = 3, enough: float = 0.3) -> float:
    """Seconds of the quickest of a few calls; of fewer, where they take long."""
    taken: list[float] = []
    while len(taken) < calls and sum(taken) < enough:
        taken.append(once(run, device))
    return min(taken)


def free_bytes(device: str) -> int:
    """Of a GPU's memory: what nobody has, and what PyTorch's allocator keeps for this process."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


# ---------------------------------------------------------------- runs side by side


class _Series:
    """The samples of one run."""

    def __init__(self, run: Run, device: str, slow: float) -> None:
        self.run, self.device = run, device
        first = once(run, device)
        self.samples: list[float] = [first] if first > slow else []  # a slow call is not made twice to warm up
        self.typical = first if self.samples else once(run, device)
        self.repeats = max(1, math.ceil(1e-3 / self.typical))
        self.spent = sum(self.samples)

    def sample(self) -> None:
        taken = once(self.run, self.device, self.repeats)
        self.samples.append(taken)
        self.spent += taken * self.repeats


def interleaved(
    runs: Mapping[str, Run],
    device: str = "cpu",
    seconds: float = 3.0,
    least: int = 3,
    most: int = 50,
    slow: float = 2.0,
) -> dict[str, Timing]:
    """Time the runs by turns, so that whatever else the machine does falls on all alike.

    Args:
        runs: by name; each is called before it is timed, and that call counts if it takes longer than `slow`.
        device: "cpu" or "cuda".
        seconds: about how long all of it may take; each run gets its share. Runs near the fastest get `least` samples
            nevertheless, unless that takes ten times as long; the others at least one.
        most: samples of one run.
        slow: seconds of a call that does not need another one to warm up.

    Runs faster than a millisecond are repeated within a sample, so that the clock does not show.
    """
    series = {name: _Series(run, device, slow) for name, run in runs.items()}
    share = seconds / max(len(runs), 1)
    start = time.perf_counter()
    for _ in range(most):
        late = time.perf_counter() - start > 10 * seconds
        fastest = min((one.typical for one in series.values()), default=0.0)
        for one in series.values():
            rival = one.typical <= _HOPELESS * fastest and len(one.samples) < least
            if not one.samples or (not late and (rival or one.spent < share)):
                one.sample()
    return {name: Timing.of(one.samples) for name, one in series.items()}


# ---------------------------------------------------------------- what the machine does


@dataclass(frozen=True)
class Rates:
    """Of the machine: matrix products of `size` squared (FLOP/s), and copies (bytes/s, read and written)."""

    gemm: float
    copy: float
    size: int = 2048


class Machine:
    """The rates of this machine by dtype and number of threads, sampled now and then; the medians stand.

    Where it is `tiny`, products and copies are small, and the rates say nothing: for rehearsals.
    """

    def __init__(self, device: str = "cpu", tiny: bool = False) -> None:
        self.device, self.tiny = device, tiny
        self._samples: dict[tuple[torch.dtype, int], list[tuple[float, float]]] = {}
        self._runs: dict[torch.dtype, tuple[int, Run]] = {}
        self._in_a_row = _GPU_ROW if device == "cuda" else 1

    def sample(self, dtype: torch.dtype) -> None:
        """A product and a copy more (a few in a row on a GPU), on torch's present number of threads."""
        size, product = self._product(dtype)
        taken = [once(run, self.device, self._in_a_row) for run in (product, self._copy)]
        key = dtype, torch.get_num_threads()
        self._samples.setdefault(key, []).append((2 * size**3 / taken[0], 2 * self.copied_bytes() / taken[1]))

    def samples(self, dtype: torch.dtype) -> list[tuple[float, float]]:
        """All of a dtype on torch's present number of threads: FLOP/s and bytes/s."""
        return self._samples[dtype, torch.get_num_threads()]

    def rates(self) -> dict[tuple[str, int], Rates]:
        """By dtype's name and threads."""
        found = {}
        for (dtype, threads), samples in self._samples.items():
            gemm, copy = (statistics.median(one) for one in zip(*samples, strict=True))
            found[str(dtype).removeprefix("torch."), threads] = Rates(gemm, copy, self._runs[dtype][0])
        return found

    def copied_bytes(self) -> int:
        """Of one copy, which reads and writes as many."""
        self._make_copy()
        return self._source.numel()

    def _sizes(self, dtype: torch.dtype) -> tuple[int, ...]:
        """Of products, the largest first: three matrices shall not take more than half of the memory."""
        if self.tiny or self.device != "cuda":
            return _GEMM_SIZES[-1:] if self.tiny else _GEMM_SIZES
        room = free_bytes(self.device) / 2
        fits = tuple(n for n in _GPU_GEMM_SIZES if 3 * n * n * dtype.itemsize <= room)
        return fits or _GPU_GEMM_SIZES[-1:]

    def _product(self, dtype: torch.dtype) -> tuple[int, Run]:
        """A product as large as `_GEMM_SECONDS` allow: PyTorch's 16-bit product is slow on some processors."""
        if dtype not in self._runs:
            sizes = self._sizes(dtype)
            size = sizes[-1]
            once(self._multiply(size, dtype), self.device)
            rate = size**3 / once(self._multiply(size, dtype), self.device)
            size = next((n for n in sizes if n**3 / rate < _GEMM_SECONDS), size)
            self._runs[dtype] = size, self._multiply(size, dtype)
            once(self._runs[dtype][1], self.device)
        return self._runs[dtype]

    def _multiply(self, size: int, dtype: torch.dtype) -> Run:
        """Of random numbers: with equal ones a GPU needs less power, and runs faster."""
        a, b = (torch.randn(size, size, dtype=dtype, device=self.device) for _ in range(2))
        return lambda: a @ b

    def _make_copy(self) -> None:
        if not hasattr(self, "_source"):
            size = _RANDOM_BYTES if self.tiny else _COPY_BYTES
            if self.device == "cuda" and not self.tiny:
                size, room = _GPU_COPY_BYTES, free_bytes(self.device) / 2
                while 2 * size > room and size > _RANDOM_BYTES:
                    size //= 2
            block = torch.randint(256, (min(_RANDOM_BYTES, size),), dtype=torch.uint8, device=self.device)
            self._source = block.repeat(size // len(block))
            self._target = self._source.clone()

    def _copy(self) -> None:
        self._make_copy()
        self._target.copy_(self._source)
