"""One speed measurement after the other: this package and its peers on named shapes, every run checked first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from interformer_bench import checks, limits, timing, workloads
from interformer_bench.grid import Shape
from interformer_bench.peers import OURS, Peer, candidates
from interformer_bench.peers.registry import most_bytes
from interformer_bench.progress import Progress

from interformer_kernels import _backend

PASSES = ("forward", "forward+backward")
# A peer is not waited for where its call is expected to take `_BEHIND` times as long as the fastest one's and more than
# `_PATIENCE` seconds, nor beyond `_MOST_SECONDS`; the peer that is expected to be the fastest always is. What was
# `_FAR_BEHIND` times slower than the best peer is not timed again on fewer threads.
_BEHIND, _PATIENCE, _MOST_SECONDS, _FAR_BEHIND = 5.0, 1.0, 10.0, 10.0


@dataclass(frozen=True)
class Measurement:
    """How long one runner took for one shape; `problem` says why it was not timed, where it was not."""

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


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        dtypes: names; None takes each shape's own.
        threads: numbers of CPU threads.
        seconds: about how long each (shape, pass, number of threads) is timed.
        compiled: with the peers that `torch.compile` makes.
        backend: of this package; None takes the fastest.
        peers: names of those to be timed; None takes all.
        stage: what the run is called.
        progress: hears what is going on.
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
    shapes: Sequence[Shape], settings: Settings, machine: timing.Machine | None = None
) -> Iterator[Measurement]:
    """Check, then time, every runner on every shape, in each dtype, on each number of threads, in both passes."""
    before = torch.get_num_threads()
    jobs = [(dtype, shape) for shape in shapes for dtype in settings.dtypes or shape.dtypes]
    settings.progress.begin(settings.stage, len(jobs))
    try:
        for dtype, shape in sorted(jobs, key=lambda job: job[0] != jobs[0][0]):
            law = f"{shape.law.name} ({shape.law.source})"
            settings.progress.step(f"{shape.op}, {dtype}: {shape.rows} rows, {law}, {shape.sizes}")
            yield from _Session(shape, dtype, settings, machine).measurements()
    finally:
        torch.set_num_threads(before)


class _Session:
    """The measurements of one shape in one dtype."""

    def __init__(self, shape: Shape, dtype: str, settings: Settings, machine: timing.Machine | None) -> None:
        self.shape, self.dtype, self.settings, self.machine = shape, dtype, settings, machine
        self.torch_dtype: torch.dtype = getattr(torch, dtype)
        self.lengths = shape.lengths()
        self.small = checks.small_lengths(self.lengths, shape.sizes.heads)
        known = candidates(shape.op, settings.backend, settings.compiled)
        wanted = known if settings.peers is None else (OURS, *settings.peers)
        self.runners = {name: peer for name, peer in known.items() if name in wanted}

    def measurements(self) -> Iterator[Measurement]:
        """Of all runners, passes and numbers of threads."""
        # Compiled peers keep the number of threads that they were compiled with as their most: the largest goes first.
        threads = sorted(self.settings.threads, reverse=True)
        torch.set_num_threads(threads[0])
        checker = checks.Checker(self.shape.op, self.small, self.shape.sizes, self.torch_dtype, self.settings.device)
        verdicts = {}
        for name, peer in self.runners.items():
            self.settings.progress.doing(f"checking {name}")
            verdicts[name] = checker.check(name, peer)
        self.arguments = self.shape.inputs(self.torch_dtype, self.settings.device)
        found: list[Measurement] = []
        behind: dict[tuple[str, str], str] = {}
        self._sample_machine({1, *threads})
        for number in threads:
            torch.set_num_threads(number)
            for direction in PASSES:
                problems = self._problems(direction, verdicts)
                problems |= {name: why for (name, of), why in behind.items() if of == direction}
                names = [name for name, problem in problems.items() if problem is None]
                self.settings.progress.doing(f"timing {direction}, {number} threads: {', '.join(names)}")
                taken = self._time(direction, names)
                behind |= _far_behind(taken, direction, number)
                found += [
                    self._measurement(name, number, direction, taken.get(name), problems[name]) for name in self.runners
                ]
        yield from sorted(found, key=lambda one: one.threads)

    def _sample_machine(self, threads: Iterable[int]) -> None:
        """Rates of this dtype and of float32; on one thread too: it tells whether more have cores of their own."""
        if self.machine is None:
            return
        for number in threads:
            torch.set_num_threads(number)
            for dtype in {self.torch_dtype, torch.float32}:
                self.machine.sample(dtype)

    def _problems(self, direction: str, verdicts: Mapping[str, checks.Verdict]) -> dict[str, str | None]:
        """Of every runner: why it is not timed in this pass, None where it is."""
        found: dict[str, str | None] = {}
        expected: dict[str, float] = {}
        for name, peer in self.runners.items():
            found[name] = verdicts[name].problem
            if found[name] is None and name != OURS:
                backward = peer.trains or direction == PASSES[0]
                found[name] = too_large(peer, self.arguments, direction) if backward else "has no backward on CPU"
            if found[name] is None and name != OURS:
                expected[name] = expected_seconds(self.shape, peer, self.small, verdicts[name], direction)
        fastest = min(expected.values(), default=0.0)
        patience = max(fastest, min(_MOST_SECONDS, max(_PATIENCE, _BEHIND * fastest)))
        slow = {name: f"would take about {time:.0f} s" for name, time in expected.items() if time > patience}
        return found | slow

    def _time(self, direction: str, names: Sequence[str]) -> dict[str, timing.Timing]:
        runs = {name: runner(self.shape.op, self.runners[name], self.arguments, direction) for name in names}
        for name, run in runs.items():
            if self.runners[name].compiled:
                run()  # may compile once more
        return timing.interleaved(runs, self.settings.device, self.settings.seconds) if runs else {}

    def _measurement(
        self, name: str, threads: int, direction: str, time: timing.Timing | None, problem: str | None
    ) -> Measurement:
        shape, device = self.shape, self.settings.device
        kernel = self.settings.backend or _backend.choose(workloads.kernel_of(shape.op), device, self.torch_dtype)
        done = limits.work(shape.op, self.arguments, self.lengths, shape.sizes, direction)
        return Measurement(
            op=shape.op,
            law=shape.law.name,
            source=shape.law.source,
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
            flops=done.flops,
            bytes=done.bytes,
            median=time.median if time else None,
            low=time.low if time else None,
            high=time.high if time else None,
            samples=time.samples if time else 0,
            problem=problem,
        )


def too_large(peer: Peer, arguments: workloads.Inputs, direction: str) -> str | None:
    """Why a peer is not tried on the whole batch, by the memory it would take; None where it is."""
    needed = peer.needs(arguments) * (1 if direction == PASSES[0] else 2)
    most = most_bytes(str(workloads.offsets_of(arguments).device))
    return f"would allocate about {needed / 2**30:.0f} GiB" if needed > most else None


def expected_seconds(shape: Shape, peer: Peer, small: Sequence[int], verdict: checks.Verdict, direction: str) -> float:
    """About how long a call takes, by what it took on the `small` batch."""

    def places(lengths: Sequence[int]) -> int:
        """What its work grows with: tokens, or pairs of tokens; padded ones, where it pads."""
        longest = max(lengths, default=0)
        power = 2 if shape.op == "jagged_attention" else 1
        return sum((longest if peer.tokens else length) ** power for length in lengths)

    seconds = verdict.forward if direction == PASSES[0] else verdict.training
    return seconds * places(shape.lengths()) / max(places(small), 1)


def _far_behind(taken: Mapping[str, timing.Timing], direction: str, threads: int) -> dict[tuple[str, str], str]:
    """Peers that need not be timed on fewer threads."""
    fastest = min((time.median for name, time in taken.items() if name != OURS), default=0.0)
    return {
        (name, direction): f"was {time.median / fastest:.0f} times slower than the best peer on {threads} threads"
        for name, time in taken.items()
        if name != OURS and time.median > _FAR_BEHIND * fastest
    }


def runner(op: str, peer: Peer, arguments: workloads.Inputs, direction: str) -> timing.Run:
    """A run of one peer, as `timing` takes it."""
    if direction == PASSES[0]:
        return lambda: workloads.forward(peer.run, arguments)
    return lambda: workloads.training(op, peer.run, arguments)
