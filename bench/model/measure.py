"""Time and memory of the contenders; each is checked first."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from interformer.testing import random_batch
from interformer_bench import memory, quiet, shapes, threads, timing
from interformer_bench.model.cases import SCHEMA, Case, cases
from interformer_bench.model.contenders import (
    COMPILED,
    COMPILED_MODELS,
    OURS,
    PADDED,
    PADDED_COMPILED,
    PEERS,
    REFERENCE,
    contenders,
    make,
    padded_tokens,
    runner,
    unsupported_reason,
)
from interformer_bench.progress import Progress
from interformer_bench.run import SKIP_FACTOR, SKIP_SECONDS

from interformer_kernels import testing

# Rows that every contender is checked on, their longest length, and the multiple of the budget that peers may use.
_MAX_ROWS, _MAX_LENGTH, _PEER_ALLOWANCE = 16, 256, 10.0
# Their time grows with the rows, so that a batch of about so many tokens foretells it.
_LINEAR, _SAMPLE_TOKENS = (PADDED, PADDED_COMPILED, REFERENCE), 8192
# Slow calls get their three samples only while that takes no longer than so many times the time asked for.
_PATIENCE = 2.0


@dataclass(frozen=True)
class Measured:
    """One contender on one case at its best number of threads; `problem` says why it was not timed.

    Attributes:
        best_threads: number of threads at which it was fastest.
        busy: why the machine was not quiet meanwhile; such times enter no ratio.
        peak: bytes by which a call raises the process' memory at its peak, or the reason why they are unknown.
    """

    case: Case
    contender: str
    time: timing.Timing | None = None
    peak: int | str = "-"
    problem: str | None = None
    best_threads: int | None = None
    busy: str | None = None


def wrong(name: str, lengths: Sequence[int]) -> str | None:
    """The error of a contender's logits against the reference in float64, in words; None where they are right."""
    batch = random_batch(SCHEMA, [min(length, _MAX_LENGTH) for length in lengths[:_MAX_ROWS]])
    reference = make("reference", batch)
    in_float64 = copy.deepcopy(reference.model).double()
    contender = make(name, batch)
    with torch.no_grad():
        truth, eager, logits = in_float64(batch), reference.call(batch), contender.call(contender.batch)
    share = testing.Sums.of(logits, eager, truth).judged("logits").share
    allowance = 1.0 if name == OURS else _PEER_ALLOWANCE
    return None if share <= allowance else f"wrong logits: {share:.2f} of their budget, {allowance:g} allowed"


def measure(
    chosen: Sequence[Case],
    data: Path | None,
    compile_too: bool,
    seconds: float,
    progress: Progress,
    watch: quiet.Watch | None = None,
) -> Iterator[Measured]:
    """Every contender on every case: interleaved times in this process, peak memory in a process for each."""
    progress.begin("models", len(chosen))
    for case in chosen:
        progress.step(case.name)
        problems: dict[str, str | None] = {}
        calls: dict[str, timing.TimedCall] = {}
        first_calls: dict[str, float] = {}
        for name in contenders(compile_too):
            progress.doing(f"preparing {name}")
            problems[name] = _prepare(name, case, calls, first_calls)
        progress.doing(f"timing {', '.join(calls)}")
        times, busy = at_best(calls, seconds, watch)
        calls.clear()
        torch.compiler.reset()
        for name, problem in problems.items():
            progress.doing(f"memory of {name}")
            peak = "-" if problem else memory.unsupported_reason() or _peak(case, name, data)
            number, time = times.get(name, (None, None))
            yield Measured(case, name, time, peak, problem, number, busy)


def at_best(
    calls: Mapping[str, timing.TimedCall], seconds: float, watch: quiet.Watch | None = None
) -> tuple[dict[str, tuple[int, timing.Timing]], str | None]:
    """Each call's best number of threads, of at most torch's current one, and its time there; why the machine was busy.

    Padded models far behind the best one are not tried on fewer threads, and slow calls have a single sample there.
    """
    most = torch.get_num_threads()
    times: dict[str, dict[int, timing.Timing]] = {name: {} for name in calls}
    tried, busy, left = threads.counts([most]), None, dict(calls)
    try:
        for number in tried:
            torch.set_num_threads(number)
            for name in left.keys() & COMPILED_MODELS:
                left[name]()  # compiled anew for this number of threads, which is not timed
            if watch:
                watch.anew()
            time_calls = functools.partial(
                timing.interleaved,
                left,
                seconds=seconds / len(tried),
                min_samples=3 if number == most else 1,
                patience=_PATIENCE,
            )
            found = watch.during(time_calls) if watch else time_calls()
            disturbed = watch.busy_since_last() if watch else None
            busy = busy or disturbed
            for name, time in found.items():
                times[name][number] = time
            for name in threads.dropped(found, (OURS, COMPILED), number):
                del left[name]
    finally:
        torch.set_num_threads(most)
    fastest = {name: threads.best(of_name, most) for name, of_name in times.items()}
    return {name: single for name, single in fastest.items() if single is not None}, busy


def _prepare(name: str, case: Case, calls: dict[str, timing.TimedCall], first_calls: dict[str, float]) -> str | None:
    """Add the contender's call, compiled if need be, to `calls`; or the reason why it cannot be timed."""
    reason = unsupported_reason(name, case)
    if reason is not None:
        return reason
    try:
        reason = too_slow(name, case, first_calls) or wrong(name, case.lengths())
        if reason is None:
            call = runner(make(name, case.batch()), case.direction)
            first_calls[name] = timing.once(call)
            calls[name] = call
    except Exception as error:
        reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return reason


def too_slow(name: str, case: Case, first_calls: Mapping[str, float]) -> str | None:
    """The time that the contender would take, in words, where that says all; `first_calls` are seconds of others.

    It is extrapolated from a few rows, the longest among them, uncompiled; None where the contender is worth timing.
    """
    fastest = min((seconds for peer, seconds in first_calls.items() if peer in PEERS), default=None)
    lengths = case.lengths()
    rows = max(1, _SAMPLE_TOKENS // max(max(lengths), 1))
    if fastest is None or name not in _LINEAR or rows >= len(lengths):
        return None
    few = (max(lengths), *lengths[: rows - 1])
    uncompiled = PADDED if name == PADDED_COMPILED else name
    call = runner(make(uncompiled, random_batch(SCHEMA, few)), case.direction)
    call()
    expected = timing.once(call) * padded_tokens(name, lengths) / padded_tokens(name, few)
    if expected <= max(SKIP_SECONDS, SKIP_FACTOR * fastest):
        return None
    return f"would take about {expected:.2g} s, {expected / fastest:.0f} times as long as the best padded model"


def _peak(case: Case, name: str, data: Path | None) -> int | str:
    request = json.dumps([case.name, name, str(data) if data else None, torch.get_num_threads()])
    lines, problem = memory.in_child("model.measure", [request])
    return f"failed: {problem}" if problem else int(lines[-1])


def main(request: str) -> None:
    """The child process: print by how many bytes the second call raises the process' memory at its peak."""
    name, contender, data, num_threads = json.loads(request)
    torch.set_num_threads(num_threads)
    case = next(case for case in cases(shapes.length_distributions(data)) if case.name == name)
    call = runner(make(contender, case.batch()), case.direction)
    call()
    print(memory.growth(call)[0])


if __name__ == "__main__":
    main(sys.argv[1])
