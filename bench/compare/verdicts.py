"""When a tree is slower than another: the one rule, and what of it is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from interformer_bench.report import law_of, rows
from interformer_bench.timing import Timing

from interformer_kernels._cli.tables import print_table
from interformer_kernels._files import to_json, write_text

# Medians of the same code differ by a few percent from process to process, by where its memory happens to lie.
APART, LEAST_SAMPLES = 1.05, 5
RULE = (
    f"REGRESSION: in both of two runs the lower quartile of the new times is above the upper quartile of the old ones, "
    f"and the medians are {APART - 1:.0%} or more apart, of {LEAST_SAMPLES} samples or more on each side; the second "
    f"run is made by new processes. faster: the same the other way round. BROKEN: the old tree computes it, this one "
    f"does not."
)
REGRESSION, BROKEN = "REGRESSION", "BROKEN"
COLUMNS = ("op", "lengths", "rows x mean", "sizes", "dtype", "threads", "pass", "old", "new", "new / old", "verdict")


@dataclass(frozen=True)
class Line:
    """What is compared: one pass of one shape."""

    op: str
    law: str
    source: str
    rows: int
    tokens: int
    sizes: str
    dtype: str
    threads: int
    direction: str


@dataclass(frozen=True)
class Side:
    """One tree's times, or why there are none."""

    time: Timing | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Duel:
    """Both trees on one line; `again` is the second run, where the first saw a difference."""

    line: Line
    old: Side
    new: Side
    again: tuple[Side, Side] | None = None

    @property
    def ratio(self) -> float | None:
        """New over old, of the first run's medians."""
        return self.new.time.median / self.old.time.median if self.new.time and self.old.time else None


def difference(old: Side, new: Side) -> str:
    """Of one run: "slower", "faster", "same", or "too few samples"."""
    if old.time is None or new.time is None:
        return "not timed"
    if min(old.time.samples, new.time.samples) < LEAST_SAMPLES:
        return "too few samples"
    if new.time.low > old.time.high and new.time.median >= APART * old.time.median:
        return "slower"
    if old.time.low > new.time.high and old.time.median >= APART * new.time.median:
        return "faster"
    return "same"


def differs(duel: Duel) -> bool:
    """Whether a second run shall confirm what the first one saw."""
    return difference(duel.old, duel.new) in ("slower", "faster")


def verdict(duel: Duel) -> str:
    """By the rule above."""
    if duel.old.problem or duel.new.problem:
        return _without_times(duel)
    first = difference(duel.old, duel.new)
    if not differs(duel):
        return first
    if duel.again is None:
        return f"{first} once, not repeated"
    if duel.again[1].problem:
        return f"{BROKEN} in the second run: {duel.again[1].problem}"
    if difference(*duel.again) != first:
        return f"same: {first} once of twice"
    return REGRESSION if first == "slower" else first


def _without_times(duel: Duel) -> str:
    if duel.old.problem and duel.new.problem:
        return f"neither: old {duel.old.problem}; new {duel.new.problem}"
    return f"only new: old {duel.old.problem}" if duel.old.problem else f"{BROKEN}: new {duel.new.problem}"


def failed(duels: Iterable[Duel]) -> list[Duel]:
    """Those that make the exit status 1."""
    return [duel for duel in duels if verdict(duel).startswith((REGRESSION, BROKEN))]


# ---------------------------------------------------------------- what is said


def table(duels: Iterable[Duel]) -> list[tuple[str, ...]]:
    """A row for each line."""
    found = []
    for duel in duels:
        line = duel.line
        ratios = [duel.ratio, Duel(line, *duel.again).ratio if duel.again else None]
        found.append((
            line.op, law_of(line.law, line.source), f"{line.rows} x {line.tokens / max(line.rows, 1):.0f}",
            line.sizes, line.dtype, str(line.threads), line.direction, _time(duel.old), _time(duel.new),
            ", ".join(f"{ratio:.2f}" for ratio in ratios if ratio) or "-", verdict(duel),
        ))  # fmt: skip
    return found


def _time(side: Side) -> str:
    """Median, quartiles, and how many samples."""
    if side.time is None:
        return "-"
    unit, factor = ("s", 1.0) if side.time.median >= 1 else ("ms", 1e3)
    low, median, high = (f"{x * factor:.3g}" for x in (side.time.low, side.time.median, side.time.high))
    return f"{median} {unit} ({low}..{high}, {side.time.samples})"


def summary(duels: Sequence[Duel]) -> str:
    """How many of each verdict."""
    counts = Counter(verdict(duel).partition(":")[0] for duel in duels)
    return f"{len(duels)} lines: {', '.join(f'{number} {name}' for name, number in counts.most_common())}."


def show(heading: str, duels: Sequence[Duel]) -> None:
    """On the terminal."""
    print_table(heading, COLUMNS, table(duels))
    print(f"{RULE}\n{summary(duels)}")


def write(folder: Path, heading: str, duels: Sequence[Duel]) -> None:
    """`compare.md` and `compare.json`."""
    text = [f"# {heading}", summary(duels), rows(COLUMNS, table(duels)), RULE]
    write_text(folder / "compare.md", "\n\n".join(text) + "\n")
    content = {
        "heading": heading,
        "rule": RULE,
        "lines": [{**asdict(duel), "verdict": verdict(duel)} for duel in duels],
    }
    write_text(folder / "compare.json", to_json(content))
