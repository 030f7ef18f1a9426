"""Speed measurements: this package and its peers on named shapes; every runner is checked before it is timed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from interformer_bench import checks, limits, quiet, timing, workloads
from interformer_bench.grid import Shape
from interformer_bench.ops.table import TABLE
from interformer_bench.peers import OURS, Peer
from interformer_bench.peers.registry import candidates, max_peer_bytes
from interformer_bench.progress import Progress
from interformer_bench.threads import best, counts, dropped

from interformer_kernels import _backend

PASSES = ("forward", "forward+backward")
# A peer is not timed where its call is expected to take more than `SKIP_SECONDS` and `SKIP_FACTOR` times as long as
# the fastest peer's, or more than `_MAX_SECONDS`; the peer that is expected to be the fastest is always timed.
SKIP_FACTOR, SKIP_SECONDS, _MAX_SECONDS = 5.0, 1.0, 10.0


@dataclass(frozen=True)
class Measurement:
    """The times of one runner on one shape, at the number of threads where it was fastest.

    The fields are the keys of result files; `law` is the name of the distribution of row lengths.

    Attributes:
        threads: the most threads that it might use.
        problem: why it was not timed.
        best_threads: number of threads, of at most `threads`, at which it was fastest.
        dropped: why it was not tried on fewer threads, too.
        busy: why the machine was not quiet meanwhile; such times enter no ratio.
    """

    op: str
    law: str
    source: str
    rows: int
    tokens: int
    longest: int
    sizes: str
    kind: str
    dtype: str
    device: str
    threads: int
    direction: str
    runner: str
    group: str
    backend: str
    flops: int
    bytes: int
    median: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    problem: str | None = None
    best_threads: int | None = None
    dropped: str | None = None
    busy: str | None = None


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        dtypes: names of dtypes; None takes each shape's own.
        threads: numbers of CPU threads; at each of them everything counts at its best number of threads up to it.
        seconds: approximate time for each (shape, pass, number of threads).
        compiled: whether to measure the peers that `torch.compile` makes.
        backend: backend of this package; None takes the fastest.
        peers: names of the peers to measure; None takes all.
        stage: name of the run in the progress display.
        progress: the progress display.
    """

    dtypes: tuple[str, ...] | None = None
    device: str = "cpu"
    threads: tuple[int, ...] = (1, 2)
    seconds: float = 3.0
    compiled: bool = True
    backend: str | None = None
    peers: tuple[str, ...] | None = None
    stage: str = "speed"
    progress: Progress = field(default_factory=Progress)


def measure(
    shapes: Sequence[Shape],
    settings: Settings,
    machine: timing.Machine | None = None,
    watch: quiet.Watch | None = None,
) -> Iterator[Measurement]:
    """Check and then time every runner on every shape, in each dtype, on each number of threads, in both passes."""
    before = torch.get_num_threads()
    jobs = [(dtype, shape) for shape in shapes for dtype in settings.dtypes or shape.dtypes]
    settings.progress.begin(settings.stage, len(jobs))
    try:
        for dtype, shape in sorted(jobs, key=lambda job: job[0] != jobs[0][0]):
            lengths = f"{shape.distribution.name} ({shape.distribution.source})"
            settings.progress.step(f"{shape.op}, {dtype}: {shape.rows} rows, {lengths}, {shape.sizes}")
            measured = list(_Session(shape, dtype, settings, machine, watch).measurements())
            busy = watch.busy_since_last() if watch else None
            yield from (replace(single, busy=busy) for single in measured)
    finally:
        torch.set_num_threads(before)


class _Session:
    """The measurements of one shape in one dtype."""

    def __init__(
        self,
        shape: Shape,
        dtype: str,
        settings: Settings,
        machine: timing.Machine | None,
        watch: quiet.Watch | None,
    ) -> None:
        self.shape, self.dtype, self.settings, self.machine, self.watch = shape, dtype, settings, machine, watch
        self.torch_dtype: torch.dtype = getattr(torch, dtype)
        self.lengths = shape.lengths()
        self.small = checks.small_lengths(self.lengths, shape.sizes.heads)
        available = candidates(shape.op, settings.backend, settings.compiled)
        chosen = available if settings.peers is None else (OURS, *settings.peers)
        self.runners = {name: peer for name, peer in available.items() if name in chosen}
        # A compiled peer cannot use more threads than at its first call, so the largest number goes first.
        self.counts = counts(settings.threads) if settings.device == "cpu" else sorted(settings.threads, reverse=True)
        # The times found, by pass and runner and then by number of threads, and the problems by pass.
        self.times: dict[tuple[str, str], dict[int, timing.Timing]] = {}
        self.problems: dict[str, dict[str, str | None]] = {}

    def measurements(self) -> Iterator[Measurement]:
        """The measurements of all runners, passes and numbers of threads."""
        torch.set_num_threads(self.counts[0])
        checker = checks.Checker(self.shape.op, self.small, self.shape.sizes, self.torch_dtype, self.settings.device)
        verdicts = {}
        for name, peer in self.runners.items():
            self.settings.progress.doing(f"checking {name}")
            verdicts[name] = checker.check(name, peer)
        self.arguments = self.shape.inputs(self.torch_dtype, self.settings.device)
        self._sample_machine({1, *self.settings.threads})
        self.problems = {direction: self._problems(direction, verdicts) for direction in PASSES}
        for number in self.counts:
            torch.set_num_threads(number)
            for direction in PASSES:
                self._time_pass(direction, number)
        for most in sorted(self.settings.threads):
            for direction in PASSES:
                for name in self.runners:
                    yield self._best(name, most, direction)

    def _time_pass(self, direction: str, threads: int) -> None:
        """Time a pass of everything that is not excluded, and drop what is far behind from now on."""
        names = [name for name, problem in self.problems[direction].items() if problem is None]
        self.settings.progress.doing(f"timing {direction}, {threads} threads: {', '.join(names)}")
        times = self._time(direction, names)
        for name, single in times.items():
            self.times.setdefault((direction, name), {})[threads] = single
        self.problems[direction] |= dropped(times, (OURS,), threads)

    def _best(self, name: str, most: int, direction: str) -> Measurement:
        """The measurement of a runner at its best number of threads, of at most so many."""
        fastest = best(self.times.get((direction, name), {}), most)
        if fastest is None:
            return self._measurement(name, most, direction, None, self.problems[direction][name])
        number, time = fastest
        measured = self._measurement(name, most, direction, time, None)
        return replace(measured, best_threads=number, dropped=self.problems[direction][name])

    def _sample_machine(self, threads: Iterable[int]) -> None:
        """Sample rates of this dtype and of float32; one thread, too, shows whether more have cores of their own."""
        if self.machine is None:
            return
        for number in threads:
            torch.set_num_threads(number)
            for dtype in {self.torch_dtype, torch.float32}:
                self.machine.sample(dtype)

    def _problems(self, direction: str, verdicts: Mapping[str, checks.Verdict]) -> dict[str, str | None]:
        """Every runner's reason for not being timed in this pass, None where it is timed."""
        problems: dict[str, str | None] = {}
        expected: dict[str, float] = {}
        for name, peer in self.runners.items():
            problems[name] = verdicts[name].problem
            if problems[name] is None and name != OURS:
                runs = peer.trains or direction == PASSES[0]
                problems[name] = too_large(peer, self.arguments, direction) if runs else "has no backward on CPU"
            # Grouped rows take a few calls however many they are: a small batch says nothing of their time.
            if problems[name] is None and name != OURS and not peer.within:
                expected[name] = expected_seconds(self.shape, peer, self.small, verdicts[name], direction)
        fastest = min(expected.values(), default=0.0)
        limit = max(fastest, min(_MAX_SECONDS, max(SKIP_SECONDS, SKIP_FACTOR * fastest)))
        slow = {name: f"would take about {time:.0f} s" for name, time in expected.items() if time > limit}
        return problems | slow

    def _time(self, direction: str, names: Sequence[str]) -> dict[str, timing.Timing]:
        calls = {name: runner(self.shape.op, self.runners[name], self.arguments, direction) for name in names}
        for name, call in calls.items():
            if self.runners[name].compiled:
                call()  # it may compile once more
        # Numbers of threads that are tried beside those that were asked for take no longer.
        seconds = self.settings.seconds * len(set(self.settings.threads)) / len(self.counts)
        if not calls:
            return {}

        def time_calls() -> dict[str, timing.Timing]:
            return timing.interleaved(calls, self.settings.device, seconds)

        return self.watch.during(time_calls) if self.watch else time_calls()

    def _measurement(
        self, name: str, threads: int, direction: str, time: timing.Timing | None, problem: str | None
    ) -> Measurement:
        shape, device = self.shape, self.settings.device
        kernel = self.settings.backend or _backend.choose(workloads.kernel_of(shape.op), device, self.torch_dtype)
        work = limits.work(shape.op, self.arguments, self.lengths, shape.sizes, direction)
        return Measurement(
            op=shape.op,
            law=shape.distribution.name,
            source=shape.distribution.source,
            rows=shape.rows,
            tokens=sum(self.lengths),
            longest=max(self.lengths, default=0),
            sizes=str(shape.sizes),
            kind=shape.kind,
            dtype=self.dtype,
            device=device,
            threads=threads,
            direction=direction,
            runner=name,
            group=self.runners[name].group,
            backend=kernel if name == OURS else "torch",
            flops=work.flops,
            bytes=work.bytes,
            median=time.median if time else None,
            low=time.low if time else None,
            high=time.high if time else None,
            samples=time.samples if time else 0,
            problem=problem,
        )


def too_large(peer: Peer, arguments: workloads.Inputs, direction: str) -> str | None:
    """The reason why a peer is not run on the whole batch, the memory it would take; None where it is run."""
    needed = peer.needs(arguments) * (1 if direction == PASSES[0] else 2)
    allowed = max_peer_bytes(str(workloads.key_offsets(arguments).device))
    return f"would allocate about {needed / 2**30:.0f} GiB" if needed > allowed else None


def expected_seconds(shape: Shape, peer: Peer, small: Sequence[int], verdict: checks.Verdict, direction: str) -> float:
    """The approximate time of a call, extrapolated from the `small` batch."""

    def work(lengths: Sequence[int]) -> float:
        """Tokens, or pairs of tokens, in proportion to which the time grows; padded ones where the peer pads."""
        longest = max(lengths, default=0)
        power = 2 if TABLE[shape.op].packed_queries else 1
        return sum(peer.padded_length(length, longest) ** power for length in lengths)

    seconds = verdict.forward if direction == PASSES[0] else verdict.training
    return seconds * work(shape.lengths()) / max(work(small), 1)


def runner(op: str, peer: Peer, arguments: workloads.Inputs, direction: str) -> timing.TimedCall:
    """One pass of a peer on these arguments, as a call that `timing` takes."""
    if direction == PASSES[0]:
        return lambda: workloads.forward(peer.run, arguments)
    return lambda: workloads.training(op, peer.run, arguments)
