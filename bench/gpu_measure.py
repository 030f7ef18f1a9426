"""One job on a GPU: every runner checked, timed in eager PyTorch, and as a CUDA graph; every result a record at once.

Calls take turns on `SETS` sets of inputs, or a small batch would be read from the GPU's cache. Records of a runner and
pass are written when its eager time is known, and again with its graph's: a later one takes the earlier one's place.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from interformer_bench import checks, limits, run, timing, workloads
from interformer_bench.gpu_jobs import Job
from interformer_bench.gpu_place import Place, Record, Write, captured, told, why_not_captured
from interformer_bench.peers import OURS, Peer
from interformer_bench.peers.on_gpu import FULL, gpu_peers
from interformer_bench.run import PASSES
from interformer_bench.workloads import Inputs

SETS = 3
# Seconds that all runners of a pass are timed together, and each graph alone; and of a call that is not repeated.
_EAGER_SECONDS, _GRAPH_SECONDS, _PATIENCE = 1.6, 0.15, 3.0
# All sets of inputs together may take this share of the free memory.
_ROOM = 0.25


@dataclass(frozen=True)
class Runner:
    """One way to compute the job's op: this package's, or a peer; `problem` says what is wrong with it.

    Who has a problem is not timed, but for this package where it returned wrong numbers: how fast it did is worth
    knowing, and is in no ratio.
    """

    name: str
    backend: str
    peer: Peer
    problem: str | None = None

    @property
    def ours(self) -> bool:
        """Whether it is this package's."""
        return self.name == OURS

    @property
    def runs(self) -> bool:
        """Whether it is timed."""
        return self.problem is None or (self.ours and self.problem.startswith(checks.WRONG))


def measure(job: Job, backends: Sequence[str], place: Place, write: Write) -> bool:
    """Do a job; whether all is right with this package."""
    if job.shape is None:
        return measure_ceilings(job, place, write)
    return Session(job, backends, place, write).run()


def measure_ceilings(job: Job, place: Place, write: Write) -> bool:
    """The rates of products of large random matrices, and of copies: a record for each dtype."""
    machine = timing.Machine(place.device, place.tiny)
    for dtype in (torch.bfloat16, torch.float32):
        for _ in range(2 if place.tiny else 7):
            machine.sample(dtype)
        gemm, copy = zip(*machine.samples(dtype), strict=True)
        name = str(dtype).removeprefix("torch.")
        rates = machine.rates()[name, torch.get_num_threads()]
        write({
            "kind": "ceiling", "step": job.name, "dtype": name, "gemm": rates.gemm, "size": rates.size,
            "gemm_spread": (max(gemm) - min(gemm)) / rates.gemm, "copy": rates.copy, "copied": machine.copied_bytes(),
            "copy_spread": (max(copy) - min(copy)) / rates.copy, "samples": len(gemm), "problem": None,
        })  # fmt: skip
    return True


class Session:
    """The measurements of one job."""

    def __init__(self, job: Job, backends: Sequence[str], place: Place, write: Write) -> None:
        assert job.shape is not None
        self.job, self.shape, self.place, self.write = job, job.shape, place, write
        self.dtype: torch.dtype = getattr(torch, job.dtype)
        self.lengths = self.shape.lengths()
        self.sets: list[Inputs] = []
        self.runners = list(self._runners(backends))
        self.checkers: dict[tuple[int, ...], checks.Checker] = {}
        self.wrong = False

    def run(self) -> bool:
        """Check, time, capture; whether all is right with this package."""
        try:
            self._run()
        except Exception as error:
            traceback.print_exc()
            self._failed(told(error))
        return not self.wrong

    def _run(self) -> None:
        self.runners = [self._told(self._checked(one)) for one in self.runners]
        self.sets = list(self._inputs())
        self.sample = checks.Sample(self.shape.op, self.lengths, self.shape.sizes, self.sets[0])
        self.runners = [one if one.problem else self._told(self._checked_whole(one)) for one in self.runners]
        timed: list[tuple[Runner, str, Record]] = []
        for direction in PASSES:
            timed += self._eager(direction)
        if self.place.gpu:
            for one, direction, times in timed:
                self.write({**self._about(one, direction), **times, **self._graph(one, direction)})
                self._want_gpu(one)

    def _want_gpu(self, after: Runner) -> None:
        """Ends the job where the GPU answers no more: whoever comes next would be blamed for it."""
        if self.place.is_lost():
            raise RuntimeError(f"the GPU answers no more since {after.name} ({after.backend}) ran")

    def _failed(self, problem: str) -> None:
        self.wrong = True
        self.write({"kind": "failed", "step": self.job.name, "problem": problem})

    # ------------------------------------------------------------ who runs

    def _runners(self, backends: Sequence[str]) -> Iterator[Runner]:
        op, sizes = self.shape.op, self.shape.sizes
        attends = op not in ("apply_rotary", "personalized_ffn")
        for name in backends:
            reason = self.place.why_not(op, name, self.dtype, sizes.head_size if attends else 0)
            yield Runner(OURS, name, Peer(workloads.ours(op, self.place.backend(name))), reason)
        for name, peer in gpu_peers(op, self.lengths, self.job.compiled).items():
            yield Runner(name, "torch", peer)

    def _checked(self, one: Runner) -> Runner:
        """With its problem on a few short rows, where it has one."""
        if one.problem is not None:
            return one
        sizes, op = self.shape.sizes, self.shape.op
        small = checks.small_lengths(self.lengths, sizes.heads)
        if one.name in FULL:
            small = (max(small),) * (len(small) - 1)
        checker = self.checkers.setdefault(small, checks.Checker(op, small, sizes, self.dtype, self.place.device))
        peer = one.peer if one.ours else gpu_peers(op, small, self.job.compiled)[one.name]
        return replace(one, problem=checker.check(one.name, peer).problem)

    def _inputs(self) -> Iterator[Inputs]:
        """Sets of inputs, fewer where memory is short."""
        free = self.place.free_bytes()
        first = self.shape.inputs(self.dtype, self.place.device)
        yield first
        size = sum(x.numel() * x.element_size() for x in first.values() if isinstance(x, torch.Tensor))
        for seed in range(1, SETS):
            if (seed + 1) * size <= _ROOM * free:
                yield self.shape.inputs(self.dtype, self.place.device, seed)

    def _checked_whole(self, one: Runner) -> Runner:
        """With its problem on the whole batch, where it has one: memory, a failure, or wrong rows."""
        try:
            large = None if one.ours else run.too_large(one.peer, self.sets[0], PASSES[1 if one.peer.trains else 0])
            return replace(one, problem=large or self._wrong(one))
        except Exception as error:
            self._free()
            return replace(one, problem=f"failed: {told(error)}")

    def _wrong(self, one: Runner) -> str | None:
        arguments, op = self.sets[0], self.shape.op
        problem = self.sample.problem({"out": workloads.forward(one.peer.run, arguments)}, one.ours)
        if problem is None and one.peer.trains:
            problem = self.sample.problem(workloads.training(op, one.peer.run, arguments), one.ours)
        return problem

    # ------------------------------------------------------------ times

    def _calls(self, one: Runner, direction: str) -> list[timing.Run]:
        return [run.runner(self.shape.op, one.peer, arguments, direction) for arguments in self.sets]

    def _eager(self, direction: str) -> list[tuple[Runner, str, Record]]:
        """Times of all runners, by turns; written at once."""
        ready: dict[str, tuple[Runner, _Turns]] = {}
        for one in self.runners:
            if one.runs and (one.peer.trains or direction == PASSES[0]):
                reason = self._warm(one, direction)
                if reason is None:
                    ready[f"{one.name} {one.backend}"] = one, _Turns(self._calls(one, direction))
                else:
                    self._told(replace(one, problem=reason), (direction,))
        tiny = self.place.tiny
        taken = timing.interleaved(
            {name: call for name, (_, call) in ready.items()},
            self.place.device,
            0.0 if tiny else _EAGER_SECONDS,
            most=2 if tiny else 50,
        )
        found = []
        for name, (one, call) in ready.items():
            times = {**_times(taken[name]), "peak": self._peak(call)}
            if call.problem is not None:
                self._told(replace(one, problem=call.problem), (direction,))
                continue
            self.write({**self._about(one, direction), **times})
            found.append((one, direction, times))
        return found

    def _warm(self, one: Runner, direction: str) -> str | None:
        """Call it on each set, which may compile; why it is not timed, where it is not."""
        try:
            calls = self._calls(one, direction)
            for call in calls:
                call()
            seconds = timing.once(calls[0], self.place.device)
            if not one.ours and seconds > _PATIENCE:
                return f"takes {seconds:.0f} s"
        except Exception as error:
            self._free()
            return f"failed: {told(error)}"
        return None

    def _graph(self, one: Runner, direction: str) -> Record:
        """The time of a call in a CUDA graph of one call on each set of inputs, or why there is none."""
        calls = self._calls(one, direction)
        try:
            reason = why_not_captured(calls[0])
            if reason is not None:
                return {"graph": None, "graph_problem": reason}
            replay, kept = captured(lambda: _last(calls), self.place)
            took = timing.interleaved({"graph": replay}, self.place.device, _GRAPH_SECONDS)["graph"]
            del kept
        except Exception as error:
            return {"graph": None, "graph_problem": f"failed: {told(error)}"}
        finally:
            self._free()
        low, median, high = (seconds / len(calls) for seconds in (took.low, took.median, took.high))
        return {"graph": median, "graph_low": low, "graph_high": high, "graph_problem": None}

    def _peak(self, call: Callable[[], object]) -> int | None:
        """Bytes that one call allocates at its peak, outputs included."""
        if not self.place.gpu:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    def _free(self) -> None:
        """Give back what a failed or finished runner leaves in PyTorch's allocator."""
        if self.place.gpu:
            try:
                torch.cuda.empty_cache()
            except Exception:  # after a failed capture, or on a lost device: `is_lost` tells which
                return

    # ------------------------------------------------------------ records

    def _told(self, one: Runner, directions: Sequence[str] = PASSES) -> Runner:
        """The runner; its problem, where it has one, is written for these passes, and may be the end of the job."""
        if one.problem is not None:
            self.wrong |= one.ours
            for direction in directions:
                self.write(self._about(one, direction))
            self._want_gpu(one)
        return one

    def _about(self, one: Runner, direction: str) -> Record:
        """A record without times."""
        shape, sets = self.shape, self.sets
        stand_in = self.place.backend(one.backend) if one.ours and not self.place.gpu else None
        done = limits.work(shape.op, sets[0], self.lengths, shape.sizes, direction) if sets else None
        wanted = dict(zip(PASSES, self.job.wanted, strict=True))[direction]
        return {
            "kind": "bench", "step": self.job.name, "op": shape.op, "law": shape.law.name, "source": shape.law.source,
            "rows": shape.rows, "tokens": sum(self.lengths), "longest": max(self.lengths, default=0),
            "sizes": str(shape.sizes), "dtype": self.job.dtype, "pass": direction, "runner": one.name,
            "backend": one.backend, "stand_in": stand_in, "compiled": self.job.compiled, "sets": len(sets),
            "flops": done and done.flops, "bytes": done and done.bytes, "wanted": wanted, "median": None, "low": None,
            "high": None, "samples": 0, "spread": None, "graph": None, "graph_low": None, "graph_high": None,
            "graph_problem": None if self.place.gpu else "no GPU, no graph", "peak": None, "problem": one.problem,
        }  # fmt: skip


def _times(taken: timing.Timing) -> Record:
    spread = (taken.high - taken.low) / taken.median if taken.median else 0.0
    return {"median": taken.median, "low": taken.low, "high": taken.high, "samples": taken.samples, "spread": spread}


def _last(calls: Sequence[timing.Run]) -> object:
    """Make these calls; what the last one returns. What the others return is given up, or memory would be short."""
    for call in calls:
        kept = call()
    return kept


class _Turns:
    """A run that is each of some calls in turn. One that fails does not end the others' timing: `problem` tells."""

    def __init__(self, calls: Sequence[timing.Run]) -> None:
        self.turns = itertools.cycle(calls)
        self.problem: str | None = None

    def __call__(self) -> object:
        if self.problem is None:
            try:
                return next(self.turns)()
            except Exception as error:
                self.problem = f"failed: {told(error)}"
        return None
