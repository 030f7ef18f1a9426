"""The numbers of threads at which everything is timed, so that each implementation counts at its best."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from interformer_bench.timing import Timing

# Every number of threads up to this one is tried, and powers of two beyond.
_EVERY = 4
# A peer that was so many times slower than the best one is not timed again on fewer threads.
_DROP_FACTOR = 5.0


def counts(threads: Iterable[int]) -> list[int]:
    """The numbers to time at for these numbers of threads, the largest first: them and those below."""
    tried: set[int] = set()
    for most in threads:
        tried |= {most, *range(1, min(most, _EVERY) + 1)}
        power = _EVERY
        while power < most:
            tried.add(power)
            power *= 2
    return sorted(tried, reverse=True)


def best(times: Mapping[int, Timing], most: int) -> tuple[int, Timing] | None:
    """The fastest number of threads of at most so many, with its time; None without any."""
    allowed = {count: time for count, time in times.items() if count <= most}
    return min(allowed.items(), key=lambda item: item[1].median, default=None)


def dropped(times: Mapping[str, Timing], ours: Collection[str], threads: int) -> dict[str, str]:
    """Peers that are not timed on fewer threads after these times on `threads`, and why; `ours` are none."""
    fastest = min((time.median for name, time in times.items() if name not in ours), default=0.0)
    return {
        name: f"was {time.median / fastest:.0f} times slower than the best peer on {threads} threads"
        for name, time in times.items()
        if name not in ours and time.median > _DROP_FACTOR * fastest
    }
