"""Comparable timings: interleaved calls, medians with spread, and the machine's own rates in the same run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# A call whose arguments are bound, as it is timed.
TimedCall = Callable[[], object]
# A call this many times slower than the second fastest, which ours or the best peer is, gets one sample, its warm-up:
# more would not change the comparison.
_SLOW_FACTOR = 3.0
# Sizes of the matrices of a GEMM, the largest first; a smaller one is taken where a product would take longer than
# this.
_GEMM_SIZES, _GEMM_SECONDS = (2048, 1024, 512, 256), 3.0
_COPY_BYTES = 256 * 2**20
# On a GPU matrices and copies are larger, unless its memory is short, and a sample is several in a row: otherwise
# launch and synchronisation would be a part of the time.
_GPU_GEMM_SIZES, _GPU_COPY_BYTES, _GPU_REPEATS = (8192, 4096, 2048, 1024, 512, 256), 4 * 2**30, 10
# A sample of a shorter call follows an untimed call.
_SETTLED_BELOW = 1.0
# Period of the random bytes that are copied.
_RANDOM_BYTES = 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median of `samples` samples, and the quartiles around it."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """The statistics of single measurements."""
        if len(seconds) < 2:
            return cls(seconds[0], seconds[0], seconds[0], len(seconds))
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


def wait(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def once(call: TimedCall, device: str = "cpu", repeats: int = 1) -> float:
    """Seconds of one call, averaged over `repeats` in a row.

    A GPU is timed by events on the device, so the final synchronisation does not count: the time is that of the
    kernels, or of the host where it delays them between the first launch and the last.
    """
    wait(device)
    if device == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def settled(call: TimedCall, typical: float, device: str = "cpu", repeats: int = 1) -> float:
    """`once`, after an untimed call where that is short.

    Between two samples of a call others run for a second or longer. A virtual machine's host may take back memory that
    rests so long: after 0.2 s on one, 25 MiB took 100 ms to read and 2 ms when read again, so that the fastest
    contender waited longest beside its own time, and calls in turn with such calls stayed slow for good.
    """
    if device == "cpu" and typical < _SETTLED_BELOW:
        call()
    return once(call, device, repeats)


def quickest(call: TimedCall, device: str = "cpu", max_calls: int = 3, enough: float = 0.3) -> float:
    """Seconds of the fastest of a few calls; no further call is made once `enough` seconds have passed."""
    seconds: list[float] = []
    while len(seconds) < max_calls and sum(seconds) < enough:
        seconds.append(once(call, device))
    return min(seconds)


def free_bytes(device: str) -> int:
    """Bytes of GPU memory that this process can allocate: free ones, and those cached by PyTorch's allocator."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


# ---------------------------------------------------------------- interleaved calls


class _Series:
    """The samples of one call."""

    def __init__(self, call: TimedCall, device: str, slow: float) -> None:
        self.call, self.device = call, device
        first = once(call, device)
        self.samples: list[float] = [first] if first > slow else []  # a slow call is not repeated to warm up
        self.typical = first if self.samples else once(call, device)
        self.repeats = max(1, math.ceil(1e-3 / self.typical))
        self.spent = sum(self.samples)

    def keep_typical(self) -> None:
        """Take the warm-up's last call as the only sample."""
        if not self.samples:
            self.samples, self.spent = [self.typical], self.typical

    def sample(self) -> None:
        seconds = settled(self.call, self.typical, self.device, self.repeats)
        self.samples.append(seconds)
        self.spent += seconds * self.repeats


def interleaved(
    calls: Mapping[str, TimedCall],
    device: str = "cpu",
    seconds: float = 3.0,
    min_samples: int = 3,
    max_samples: int = 50,
    slow: float = 2.0,
    patience: float = 10.0,
) -> dict[str, Timing]:
    """Time the calls in turn, one sample each, so that other load on the machine affects all of them alike.

    Args:
        calls: by name; each is called before it is timed, and that call counts if it takes longer than `slow`.
        device: "cpu" or "cuda".
        seconds: approximate time for all calls together, shared equally. Calls close to the two fastest get
            `min_samples` even beyond it, unless that takes `patience` times as long; every call gets at least one
            sample.
        max_samples: samples of one call at most.
        slow: a call that takes this many seconds needs no second one to warm up.

    Calls faster than a millisecond are repeated within a sample, so that the clock's resolution does not matter.
    """
    series = {name: _Series(call, device, slow) for name, call in calls.items()}
    share = seconds / max(len(calls), 1)
    second = max(sorted(single.typical for single in series.values())[:2], default=0.0)
    for single in series.values():
        if single.typical > max(_SLOW_FACTOR * second, share):
            single.keep_typical()
    start = time.perf_counter()
    for _ in range(max_samples):
        late = time.perf_counter() - start > patience * seconds
        for single in series.values():
            close = single.typical <= _SLOW_FACTOR * second and len(single.samples) < min_samples
            if not single.samples or (not late and (close or single.spent < share)):
                single.sample()
    return {name: Timing.of(single.samples) for name, single in series.items()}


# ---------------------------------------------------------------- rates of the machine


@dataclass(frozen=True)
class Rates:
    """The machine's rates: products of `size` x `size` matrices (FLOP/s) and copies (bytes/s, read and written)."""

    gemm: float
    copy: float
    size: int = 2048


class Machine:
    """The machine's rates by dtype and number of threads: medians of samples that are taken between measurements.

    `tiny` makes products and copies small, for rehearsals: the rates then mean nothing.
    """

    def __init__(self, device: str = "cpu", tiny: bool = False) -> None:
        self.device, self.tiny = device, tiny
        self._samples: dict[tuple[torch.dtype, int], list[tuple[float, float]]] = {}
        self._products: dict[torch.dtype, tuple[int, TimedCall]] = {}
        self._repeats = _GPU_REPEATS if device == "cuda" else 1

    def sample(self, dtype: torch.dtype) -> None:
        """Take one more sample of a product and of a copy on torch's current number of threads."""
        size, product = self._product(dtype)
        product_seconds, copy_seconds = (
            settled(call, 0.0, self.device, self._repeats) for call in (product, self._copy)
        )
        key = dtype, torch.get_num_threads()
        rates = 2 * size**3 / product_seconds, 2 * self.copied_bytes() / copy_seconds
        self._samples.setdefault(key, []).append(rates)

    def samples(self, dtype: torch.dtype) -> list[tuple[float, float]]:
        """All samples of a dtype on torch's current number of threads: FLOP/s and bytes/s."""
        return self._samples[dtype, torch.get_num_threads()]

    def rates(self) -> dict[tuple[str, int], Rates]:
        """The median rates by name of dtype and number of threads."""
        rates = {}
        for (dtype, threads), samples in self._samples.items():
            gemm, copy = (statistics.median(values) for values in zip(*samples, strict=True))
            rates[str(dtype).removeprefix("torch."), threads] = Rates(gemm, copy, self._products[dtype][0])
        return rates

    def copied_bytes(self) -> int:
        """Bytes of one copy: it reads and writes this many each."""
        self._make_copy()
        return self._source.numel()

    def _sizes(self, dtype: torch.dtype) -> tuple[int, ...]:
        """Sizes of products, the largest first, whose three matrices fit into half of the memory."""
        if self.tiny or self.device != "cuda":
            return _GEMM_SIZES[-1:] if self.tiny else _GEMM_SIZES
        room = free_bytes(self.device) / 2
        fits = tuple(n for n in _GPU_GEMM_SIZES if 3 * n * n * dtype.itemsize <= room)
        return fits or _GPU_GEMM_SIZES[-1:]

    def _product(self, dtype: torch.dtype) -> tuple[int, TimedCall]:
        """The largest product that `_GEMM_SECONDS` allow: PyTorch's 16-bit product is slow on some processors."""
        if dtype not in self._products:
            sizes = self._sizes(dtype)
            size = sizes[-1]
            once(self._multiply(size, dtype), self.device)
            rate = size**3 / once(self._multiply(size, dtype), self.device)
            size = next((n for n in sizes if n**3 / rate < _GEMM_SECONDS), size)
            self._products[dtype] = size, self._multiply(size, dtype)
            once(self._products[dtype][1], self.device)
        return self._products[dtype]

    def _multiply(self, size: int, dtype: torch.dtype) -> TimedCall:
        """A product of random matrices: with constant ones a GPU draws less power and runs faster."""
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
