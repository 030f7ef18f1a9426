"""The time of each line beside the machine's rates, which are taken between its samples on the same threads."""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from interformer_bench import checks, limits, quiet, timing, workloads
from interformer_bench.peers import OURS, Peer
from interformer_bench.progress import Progress
from interformer_bench.rows.lines import Line
from interformer_bench.run import runner

# Bytes of inputs that lie in memory: so many times the last cache, as far as a share of the machine's memory allows.
_CACHES, _MEMORY_SHARE = 4, 1 / 16
_LARGEST_COPY = 1 << 30
_MIN_SAMPLES = 3
_DEFAULT_CACHE = 32 << 20


@dataclass(frozen=True)
class RowMeasurement:
    """One line in one dtype; `problem` says why it was not timed, `busy` why the machine was not quiet.

    Attributes:
        copied: bytes of the copy's source and target together.
        copy: bytes a second, read and written.
        gemm: FLOP/s of the faster of the dtype's own product and float32's, to which 16-bit numbers can be widened;
            PyTorch's own product of float16 may take seconds.
    """

    line: str
    op: str
    dtype: str
    threads: int
    rows: int
    tokens: int
    flops: int = 0
    bytes: int = 0
    time: timing.Timing | None = None
    copied: int = 0
    copy: float = 0.0
    gemm: float = 0.0
    problem: str | None = None
    busy: str | None = None

    @property
    def of_copy(self) -> float:
        """The share of the copy rate."""
        return self.bytes / self.copy / self.time.median if self.time else 0.0

    @property
    def of_gemm(self) -> float:
        """The share of the rate of matrix products."""
        return self.flops / self.gemm / self.time.median if self.time else 0.0


def last_cache() -> int:
    """Bytes of the largest cache that the system tells of."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=_DEFAULT_CACHE)


def memory_bytes() -> int:
    """Bytes of float32 inputs that no cache holds, as far as the machine's memory allows."""
    available = _DEFAULT_CACHE * _CACHES / _MEMORY_SHARE
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        available = int(line.split()[1]) * 1024
    return int(min(_CACHES * last_cache(), _MEMORY_SHARE * available))


def measure(
    chosen: Sequence[Line],
    dtypes: Sequence[str],
    memory: int,
    seconds: float,
    machine: timing.Machine,
    watch: quiet.Watch | None,
    progress: Progress,
) -> Iterator[RowMeasurement]:
    """Every line in every dtype on torch's current number of threads."""
    progress.begin("rows", len(chosen) * len(dtypes))
    for line in chosen:
        for dtype in dtypes:
            progress.step(f"{line.name}, {dtype}")
            yield _measured(line, dtype, memory, seconds, machine, watch)


def _measured(
    line: Line, dtype: str, memory: int, seconds: float, machine: timing.Machine, watch: quiet.Watch | None
) -> RowMeasurement:
    kind, peer, threads = getattr(torch, dtype), Peer(workloads.ours(line.op)), torch.get_num_threads()
    lengths, arguments = line.batch(dtype, memory)
    named = line.name, line.op, dtype, threads, len(lengths), sum(lengths)
    small = checks.small_lengths(lengths, line.sizes.heads)
    problem = checks.Checker(line.op, small, line.sizes, kind).check(OURS, peer).problem
    if problem is not None:
        return RowMeasurement(*named, problem=problem)
    work = limits.work(line.op, arguments, lengths, line.sizes, line.direction)
    copied = min(work.bytes, _LARGEST_COPY)
    calls = {OURS: runner(line.op, peer, arguments, line.direction), "copy": _copy(copied)}
    products = {torch.float32} if dtype == "float16" else {torch.float32, kind}
    for product in products:
        machine.sample(product)
    time_calls = functools.partial(_alternating, calls, seconds)
    times = watch.during(time_calls) if watch else time_calls()
    busy = watch.busy_since_last() if watch else None
    rates = machine.rates()
    del arguments, calls, time_calls
    gc.collect()  # autograd's cycles would keep the inputs beside those of the next line
    return RowMeasurement(
        *named,
        flops=work.flops,
        bytes=work.bytes,
        time=times[OURS],
        copied=copied,
        copy=copied / times["copy"].median,
        gemm=max(rates[str(product).removeprefix("torch."), threads].gemm for product in products),
        busy=busy,
    )


def _copy(size: int) -> timing.TimedCall:
    """A copy whose source and target take `size` bytes together."""
    source = torch.zeros(-(-size // 2), dtype=torch.uint8)
    target = source.clone()
    return lambda: target.copy_(source)


def _alternating(calls: Mapping[str, timing.TimedCall], seconds: float) -> dict[str, timing.Timing]:
    """Time the calls in turn, so that each has the caches to itself as seldom as the other."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    # Outputs' pages, threads and code are there from the first call on.
    typical = {name: timing.quickest(call, max_calls=2, enough=math.inf) for name, call in calls.items()}
    start = time.perf_counter()
    while len(samples[OURS]) < _MIN_SAMPLES or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            samples[name].append(timing.settled(call, typical[name]))
    return {name: timing.Timing.of(times) for name, times in samples.items()}
