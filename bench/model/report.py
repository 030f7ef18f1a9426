"""Results of whole models as a table with their targets, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from interformer_bench import quiet, waiting
from interformer_bench.model.contenders import COMPILED, OURS, PEERS
from interformer_bench.model.measure import Measured
from interformer_bench.report import distribution_label, rows

from interformer_kernels._files import to_json, write_text

COLUMNS = (
    "lengths",
    "rows x mean (longest)",
    "pass",
    "model",
    "time",
    "threads used",
    "spread",
    "peak memory",
    "of ours",
    "targets",
)
Group = dict[str, Measured]
# The fastest of each side counts.
_SIDES = (OURS, COMPILED), PEERS


def groups(measured: Iterable[Measured]) -> list[Group]:
    """The contenders of each case by name."""
    by_case: dict[str, Group] = {}
    for result in measured:
        by_case.setdefault(result.case.name, {})[result.contender] = result
    return list(by_case.values())


def table(measured: Iterable[Measured]) -> list[tuple[str, ...]]:
    """A row for each contender of each case."""
    return [_row(result, group) for group in groups(measured) for result in group.values()]


def _row(result: Measured, group: Group) -> tuple[str, ...]:
    case, ours, lengths, time = result.case, group[OURS], result.case.lengths(), result.time
    batch = f"{case.rows} x {sum(lengths) / len(lengths):.0f} ({max(lengths)})"
    label = distribution_label(case.distribution.name, case.distribution.source)
    cells = label, batch, case.direction, result.contender
    if time is None:
        return (*cells, result.problem or "-", "-", "-", "-", "-", "-")
    spread = f"{(time.high - time.low) / time.median:.0%} of {time.samples}"
    peak = result.peak if isinstance(result.peak, str) else f"{result.peak / 2**20:.0f} MiB"
    of_ours = f"{time.median / ours.time.median:.2f}x" if ours.time else "-"
    of_ours = quiet.NO_RATIO if ours.busy else of_ours
    targets = "; ".join(verdicts(group)) if result is ours else ""
    return (
        *cells,
        f"{time.median * 1e3:.4g} ms",
        str(result.best_threads or "-"),
        spread,
        peak,
        of_ours,
        targets or "-",
    )


def verdicts(group: Group) -> list[str]:
    """The targets of the case with their results, and whether they are met; speed only where the machine was quiet."""
    case, busy = group[OURS].case, group[OURS].busy
    texts = [busy] if busy else []
    ours, peer = (_best(group, names) for names in _SIDES)
    if case.ratio is not None and ours and peer and not busy:
        (_, our_seconds), (name, seconds) = ours, peer
        ratio = seconds / our_seconds
        texts.append(f">= {case.ratio:g}x the best, {name}: {ratio:.2f}x {_verdict(ratio >= case.ratio)}")
    peaks = [
        [x for x in (group[name].peak for name in names if name in group) if isinstance(x, int)] for names in _SIDES
    ]
    if case.memory is not None and all(peaks):
        share = min(peaks[0]) / min(peaks[1])
        texts.append(f"memory <= {case.memory:.0%}: {share:.0%} {_verdict(share <= case.memory)}")
    return texts


def _best(group: Group, names: Sequence[str]) -> tuple[str, float] | None:
    """The fastest of these contenders, and its seconds."""
    timed = {name: time.median for name in names if name in group and (time := group[name].time)}
    return min(timed.items(), key=lambda item: item[1], default=None)


def _verdict(reached: bool) -> str:
    return "pass" if reached else "MISS"


def head(checks: Sequence[quiet.Quietness]) -> str:
    """How the process waits, and whether the machine was quiet."""
    return f"{waiting.described()} {quiet.described(checks)}"


def markdown(measured: Sequence[Measured], head_text: str) -> str:
    """The head and the table in Markdown."""
    return f"{head_text}\n\n{rows(COLUMNS, table(measured))}\n"


def write_json(path: Path, measured: Sequence[Measured]) -> None:
    """Every figure, for other programs."""
    plain = [
        {
            "case": result.case.name,
            "lengths": result.case.lengths(),
            "contender": result.contender,
            "seconds": asdict(result.time) if result.time else None,
            "best_threads": result.best_threads,
            "busy": result.busy,
            "peak_bytes": result.peak,
            "problem": result.problem,
        }
        for result in measured
    ]
    write_text(path, to_json(plain))
