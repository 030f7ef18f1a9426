"""One job on a GPU: every runner is checked, timed in eager PyTorch, and timed as a CUDA graph.

Calls alternate between `SETS` sets of inputs; otherwise a small batch would be read from the GPU's cache. The record of
a runner and pass is written when its eager time is known, and again with the time of its graph, which replaces the
first.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from interformer_bench import checks, limits, run, timing, workloads
from interformer_bench.checks import error_line
from interformer_bench.gpu_jobs import Job
from interformer_bench.gpu_place import Place, Record, Write, capture_graph, no_capture_reason
from interformer_bench.ops.table import TABLE
from interformer_bench.peers import OURS, Peer
from interformer_bench.peers.on_gpu import FULL
from interformer_bench.peers.registry import gpu_peers
from interformer_bench.run import PASSES
from interformer_bench.workloads import Inputs

SETS = 3
# Seconds for all runners of a pass together, for each graph, and the longest call of a peer that is timed.
_EAGER_SECONDS, _GRAPH_SECONDS, _MAX_CALL_SECONDS = 1.6, 0.15, 3.0
# The share of the free memory that all sets of inputs together may take.
_INPUTS_SHARE = 0.25


@dataclass(frozen=True)
class Runner:
    """One implementation of the job's op, this package's or a peer; `problem` says why it is not right.

    A runner with a problem is not timed, with one exception: where this package returned wrong numbers its speed is
    still of interest, but it enters no ratio.
    """

    name: str
    backend: str
    peer: Peer
    problem: str | None = None

    @property
    def ours(self) -> bool:
        """Whether it is this package's implementation."""
        return self.name == OURS

    @property
    def runs(self) -> bool:
        """Whether it is timed."""
        return self.problem is None or (self.ours and self.problem.startswith(checks.WRONG))


def measure(job: Job, backends: Sequence[str], place: Place, write: Write) -> bool:
    """Run a job; returns whether this package had no problem."""
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
        """Check, time and capture every runner; returns whether this package had no problem."""
        try:
            self._run()
        except Exception as error:
            traceback.print_exc()
            self._write_failure(error_line(error))
        return not self.wrong

    def _run(self) -> None:
        self.runners = [self._reported(self._check_small(runner)) for runner in self.runners]
        self.sets = list(self._inputs())
        self.sample = checks.Sample(self.shape.op, self.lengths, self.shape.sizes, self.sets[0])
        self.runners = [
            runner if runner.problem else self._reported(self._check_whole(runner)) for runner in self.runners
        ]
        timed: list[tuple[Runner, str, Record]] = []
        for direction in PASSES:
            timed += self._eager(direction)
        if self.place.gpu:
            for runner, direction, times in timed:
                self.write({**self._record(runner, direction), **times, **self._graph(runner, direction)})
                self._require_gpu(runner)

    def _require_gpu(self, runner: Runner) -> None:
        """End the job where the GPU no longer responds; otherwise the next runner would be blamed for it."""
        if self.place.is_lost():
            raise RuntimeError(f"the GPU no longer responds since {runner.name} ({runner.backend}) ran")

    def _write_failure(self, problem: str) -> None:
        self.wrong = True
        self.write({"kind": "failed", "step": self.job.name, "problem": problem})

    # ------------------------------------------------------------ runners and their checks

    def _runners(self, backends: Sequence[str]) -> Iterator[Runner]:
        op, sizes = self.shape.op, self.shape.sizes
        for name in backends:
            reason = self.place.unsupported_reason(op, name, self.dtype, sizes.head_size if TABLE[op].attends else 0)
            yield Runner(OURS, name, Peer(workloads.ours(op, self.place.backend(name))), reason)
        for name, peer in gpu_peers(op, self.lengths, self.job.compiled).items():
            yield Runner(name, "torch", peer)

    def _check_small(self, runner: Runner) -> Runner:
        """The runner with its problem on a few short rows, if it has one."""
        if runner.problem is not None:
            return runner
        sizes, op = self.shape.sizes, self.shape.op
        small = checks.small_lengths(self.lengths, sizes.heads)
        if runner.name in FULL:
            small = (max(small),) * (len(small) - 1)
        checker = self.checkers.setdefault(small, checks.Checker(op, small, sizes, self.dtype, self.place.device))
        peer = runner.peer if runner.ours else gpu_peers(op, small, self.job.compiled)[runner.name]
        return replace(runner, problem=checker.check(runner.name, peer).problem)

    def _inputs(self) -> Iterator[Inputs]:
        """The sets of inputs, fewer where memory is short."""
        free = self.place.free_bytes()
        first = self.shape.inputs(self.dtype, self.place.device)
        yield first
        size = sum(x.numel() * x.element_size() for x in first.values() if isinstance(x, torch.Tensor))
        for seed in range(1, SETS):
            if (seed + 1) * size <= _INPUTS_SHARE * free:
                yield self.shape.inputs(self.dtype, self.place.device, seed)

    def _check_whole(self, runner: Runner) -> Runner:
        """The runner with its problem on the whole batch, if it has one: memory, a failure, or wrong rows."""
        direction = PASSES[1 if runner.peer.trains else 0]
        try:
            large = None if runner.ours else run.too_large(runner.peer, self.sets[0], direction)
            return replace(runner, problem=large or self._wrong(runner))
        except Exception as error:
            self._free()
            return replace(runner, problem=f"failed: {error_line(error)}")

    def _wrong(self, runner: Runner) -> str | None:
        arguments, op = self.sets[0], self.shape.op
        problem = self.sample.problem({"out": workloads.forward(runner.peer.run, arguments)}, runner.ours)
        if problem is None and runner.peer.trains:
            problem = self.sample.problem(workloads.training(op, runner.peer.run, arguments), runner.ours)
        return problem

    # ------------------------------------------------------------ times

    def _calls(self, runner: Runner, direction: str) -> list[timing.TimedCall]:
        return [run.runner(self.shape.op, runner.peer, arguments, direction) for arguments in self.sets]

    def _eager(self, direction: str) -> list[tuple[Runner, str, Record]]:
        """Interleaved times of all runners, written at once."""
        ready: dict[str, tuple[Runner, _AlternatingCall]] = {}
        for runner in self.runners:
            if runner.runs and (runner.peer.trains or direction == PASSES[0]):
                reason = self._warm_up(runner, direction)
                if reason is None:
                    call = _AlternatingCall(self._calls(runner, direction))
                    ready[f"{runner.name} {runner.backend}"] = runner, call
                else:
                    self._reported(replace(runner, problem=reason), (direction,))
        tiny = self.place.tiny
        timings = timing.interleaved(
            {name: call for name, (_, call) in ready.items()},
            self.place.device,
            0.0 if tiny else _EAGER_SECONDS,
            max_samples=2 if tiny else 50,
        )
        timed = []
        for name, (runner, call) in ready.items():
            times = {**_times(timings[name]), "peak": self._peak(call)}
            if call.problem is not None:
                self._reported(replace(runner, problem=call.problem), (direction,))
                continue
            self.write({**self._record(runner, direction), **times})
            timed.append((runner, direction, times))
        return timed

    def _warm_up(self, runner: Runner, direction: str) -> str | None:
        """Call the runner on each set, which may compile; the reason why it is not timed, if there is one."""
        try:
            calls = self._calls(runner, direction)
            for call in calls:
                call()
            seconds = timing.once(calls[0], self.place.device)
            if not runner.ours and seconds > _MAX_CALL_SECONDS:
                return f"takes {seconds:.0f} s"
        except Exception as error:
            self._free()
            return f"failed: {error_line(error)}"
        return None

    def _graph(self, runner: Runner, direction: str) -> Record:
        """The time per call of a CUDA graph with one call on each set of inputs, or the reason why there is none."""
        calls = self._calls(runner, direction)
        try:
            reason = no_capture_reason(calls[0])
            if reason is not None:
                return {"graph": None, "graph_problem": reason}
            replay, outputs = capture_graph(lambda: _last_result(calls), self.place)
            replays = timing.interleaved({"graph": replay}, self.place.device, _GRAPH_SECONDS)["graph"]
            del outputs
        except Exception as error:
            return {"graph": None, "graph_problem": f"failed: {error_line(error)}"}
        finally:
            self._free()
        low, median, high = (seconds / len(calls) for seconds in (replays.low, replays.median, replays.high))
        return {"graph": median, "graph_low": low, "graph_high": high, "graph_problem": None}

    def _peak(self, call: Callable[[], object]) -> int | None:
        """Bytes allocated at the peak of one call, outputs included."""
        if not self.place.gpu:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    def _free(self) -> None:
        """Return the memory that a failed or finished runner leaves in PyTorch's allocator."""
        if self.place.gpu:
            try:
                torch.cuda.empty_cache()
            except Exception:  # after a failed capture, or on a lost device: `is_lost` distinguishes them
                return

    # ------------------------------------------------------------ records

    def _reported(self, runner: Runner, directions: Sequence[str] = PASSES) -> Runner:
        """The runner itself. Its problem, if any, is written for these passes, and may end the job."""
        if runner.problem is not None:
            self.wrong |= runner.ours
            for direction in directions:
                self.write(self._record(runner, direction))
            self._require_gpu(runner)
        return runner

    def _record(self, runner: Runner, direction: str) -> Record:
        """The record of a runner and pass without its times."""
        shape, sets = self.shape, self.sets
        stand_in = self.place.backend(runner.backend) if runner.ours and not self.place.gpu else None
        work = limits.work(shape.op, sets[0], self.lengths, shape.sizes, direction) if sets else None
        target = dict(zip(PASSES, self.job.targets, strict=True))[direction]
        return {
            "kind": "bench", "step": self.job.name, "op": shape.op, "law": shape.distribution.name,
            "source": shape.distribution.source,
            "rows": shape.rows, "tokens": sum(self.lengths), "longest": max(self.lengths, default=0),
            "sizes": str(shape.sizes), "dtype": self.job.dtype, "pass": direction, "runner": runner.name,
            "backend": runner.backend, "stand_in": stand_in, "compiled": self.job.compiled, "sets": len(sets),
            "flops": work and work.flops, "bytes": work and work.bytes, "wanted": target, "median": None, "low": None,
            "high": None, "samples": 0, "spread": None, "graph": None, "graph_low": None, "graph_high": None,
            "graph_problem": None if self.place.gpu else "no GPU, no graph", "peak": None, "problem": runner.problem,
        }  # fmt: skip


def _times(times: timing.Timing) -> Record:
    spread = (times.high - times.low) / times.median if times.median else 0.0
    return {"median": times.median, "low": times.low, "high": times.high, "samples": times.samples, "spread": spread}


def _last_result(calls: Sequence[timing.TimedCall]) -> object:
    """Make these calls; returns the result of the last one. The other results are released, to save memory."""
    for call in calls:
        result = call()
    return result


class _AlternatingCall:
    """A call that makes one of several calls in turn. A failure sets `problem` and does not end the others' timing."""

    def __init__(self, calls: Sequence[timing.TimedCall]) -> None:
        self.calls = itertools.cycle(calls)
        self.problem: str | None = None

    def __call__(self) -> object:
        if self.problem is None:
            try:
                return next(self.calls)()
            except Exception as error:
                self.problem = f"failed: {error_line(error)}"
        return None
