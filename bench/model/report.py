"""What was measured of whole models, as a table, with verdicts on what they shall reach, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from interformer_bench.model.contenders import COMPILED, OURS, PADDED, PADDED_COMPILED
from interformer_bench.model.measure import Measured

from interformer_kernels._files import to_json, write_text

COLUMNS = ("lengths", "rows x mean (longest)", "pass", "model", "time", "spread", "peak memory", "of ours", "targets")
Group = dict[str, Measured]
# Eager and compiled, ours and theirs: the better of the two stands for each.
_SIDES = (OURS, COMPILED), (PADDED, PADDED_COMPILED)


def groups(measured: Iterable[Measured]) -> list[Group]:
    """The contenders of each case by name."""
    found: dict[str, Group] = {}
    for one in measured:
        found.setdefault(one.case.name, {})[one.contender] = one
    return list(found.values())


def table(measured: Iterable[Measured]) -> list[tuple[str, ...]]:
    """A line for each contender of each case."""
    return [_line(one, group) for group in groups(measured) for one in group.values()]


def _line(one: Measured, group: Group) -> tuple[str, ...]:
    case, ours, lengths = one.case, group[OURS], one.case.lengths()
    source = f" ({case.law.source})" if case.law.source != "synthetic" else ""
    batch = f"{case.rows} x {sum(lengths) / len(lengths):.0f} ({max(lengths)})"
    about = f"{case.law.name}{source}", batch, case.direction, one.contender
    if one.time is None:
        return (*about, one.problem or "-", "-", "-", "-", "-")
    spread = f"{(one.time.high - one.time.low) / one.time.median:.0%} of {one.time.samples}"
    peak = one.peak if isinstance(one.peak, str) else f"{one.peak / 2**20:.0f} MiB"
    of_ours = f"{one.time.median / ours.time.median:.2f}x" if ours.time else "-"
    targets = "; ".join(verdicts(group)) if one is ours else ""
    return (*about, f"{one.time.median * 1e3:.4g} ms", spread, peak, of_ours, targets or "-")


def verdicts(group: Group) -> list[str]:
    """Of what the case asks: what was found, and whether that is enough."""
    case, found = group[OURS].case, []
    mine, theirs = (_best(group, names) for names in _SIDES)
    if case.ratio is not None and mine and theirs:
        ratio = theirs / mine
        found.append(f">= {case.ratio:g}x padded: {ratio:.2f}x {'pass' if ratio >= case.ratio else 'MISS'}")
    peaks = [
        [x for x in (group[name].peak for name in names if name in group) if isinstance(x, int)] for names in _SIDES
    ]
    if case.memory is not None and all(peaks):
        share = min(peaks[0]) / min(peaks[1])
        found.append(f"memory <= {case.memory:.0%}: {share:.0%} {'pass' if share <= case.memory else 'MISS'}")
    return found


def _best(group: Group, names: Sequence[str]) -> float | None:
    return min((group[name].time.median for name in names if name in group and group[name].time), default=None)


def markdown(measured: Sequence[Measured]) -> str:
    """The table in Markdown."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *table(measured)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_json(path: Path, measured: Sequence[Measured]) -> None:
    """Every figure, for programs."""
    plain = [
        {
            "case": one.case.name,
            "lengths": one.case.lengths(),
            "contender": one.contender,
            "seconds": asdict(one.time) if one.time else None,
            "peak_bytes": one.peak,
            "problem": one.problem,
        }
        for one in measured
    ]
    write_text(path, to_json(plain))
