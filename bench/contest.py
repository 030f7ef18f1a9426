"""Contenders timed in turn, each at its best number of threads, and the cells of a table that say who won."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from interformer_bench import threads, timing
from interformer_bench.peers import OURS


def best_times(
    calls: Mapping[str, timing.TimedCall], most_threads: int, seconds: float, **slow: Any
) -> dict[str, timing.Timing]:
    """Each call's time at the number of threads, up to `most_threads`, that serves it best; torch keeps `most_threads`.

    `slow` are further arguments of `timing.interleaved`, for calls that take seconds.
    """
    found: dict[str, list[timing.Timing]] = {name: [] for name in calls}
    try:
        for count in threads.counts([1, most_threads]):
            torch.set_num_threads(count)
            for name, time in timing.interleaved(calls, seconds=seconds, **slow).items():
                found[name].append(time)
    finally:
        torch.set_num_threads(most_threads)
    return {name: min(times, key=lambda time: time.median) for name, times in found.items()}


def cells(times: Mapping[str, timing.Timing]) -> tuple[str, str, str, str]:
    """Our time, the best peer's, the ratio of both, and our spread."""
    ours = times[OURS]
    peer = min((name for name in times if name != OURS), key=lambda name: times[name].median)
    return (
        f"{ours.median * 1e3:.3g} ms",
        f"{times[peer].median * 1e3:.3g} ms ({peer})",
        f"{times[peer].median / ours.median:.2f}x",
        spread(ours),
    )


def spread(time: timing.Timing) -> str:
    """The distance of the quartiles, as a share of the median."""
    return f"{100 * (time.high - time.low) / time.median:.0f}%"
