"""The rule by which a tree is slower than another, and the report of a comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from interformer_bench.report import distribution_label, rows
from interformer_bench.timing import Timing

from interformer_kernels._cli.tables import print_table
from interformer_kernels._files import to_json, write_text

# Medians of the same code differ by a few percent between processes, which place their memory differently.
APART, MIN_SAMPLES = 1.05, 5
RULE = (
    f"REGRESSION: in both of two runs the lower quartile of the new times is above the upper quartile of the old ones, "
    f"and the medians are {APART - 1:.0%} or more apart, of {MIN_SAMPLES} samples or more on each side; the second "
    f"run is made by new processes. faster: the same the other way round. BROKEN: the old tree computes it, this one "
    f"does not."
)
REGRESSION, BROKEN = "REGRESSION", "BROKEN"
COLUMNS = ("op", "lengths", "rows x mean", "sizes", "dtype", "threads", "pass", "old", "new", "new / old", "verdict")


@dataclass(frozen=True)
class ComparedCase:
    """A case that both trees run: one pass of one shape.

    The fields are keys of compare.json; `law` is the name of the distribution of row lengths.
    """

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
class TreeTiming:
    """One tree's times, or the reason why there are none."""

    time: Timing | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Both trees on one case; `second_run` repeats it where the first run saw a difference."""

    case: ComparedCase
    old: TreeTiming
    new: TreeTiming
    second_run: tuple[TreeTiming, TreeTiming] | None = None

    @property
    def ratio(self) -> float | None:
        """New over old, of the first run's medians."""
        return self.new.time.median / self.old.time.median if self.new.time and self.old.time else None


def difference(old: TreeTiming, new: TreeTiming) -> str:
    """The result of one run: "slower", "faster", "same", "too few samples" or "not timed"."""
    if old.time is None or new.time is None:
        return "not timed"
    if min(old.time.samples, new.time.samples) < MIN_SAMPLES:
        return "too few samples"
    if new.time.low > old.time.high and new.time.median >= APART * old.time.median:
        return "slower"
    if old.time.low > new.time.high and old.time.median >= APART * new.time.median:
        return "faster"
    return "same"


def differs(comparison: Comparison) -> bool:
    """Whether a second run should confirm the difference of the first one."""
    return difference(comparison.old, comparison.new) in ("slower", "faster")


def verdict(comparison: Comparison) -> str:
    """The verdict by the rule above."""
    if comparison.old.problem or comparison.new.problem:
        return _without_times(comparison)
    first = difference(comparison.old, comparison.new)
    if not differs(comparison):
        return first
    if comparison.second_run is None:
        return f"{first} once, not repeated"
    if comparison.second_run[1].problem:
        return f"{BROKEN} in the second run: {comparison.second_run[1].problem}"
    if difference(*comparison.second_run) != first:
        return f"same: {first} once of twice"
    return REGRESSION if first == "slower" else first


def _without_times(comparison: Comparison) -> str:
    if comparison.old.problem and comparison.new.problem:
        return f"neither: old {comparison.old.problem}; new {comparison.new.problem}"
    return (
        f"only new: old {comparison.old.problem}"
        if comparison.old.problem
        else f"{BROKEN}: new {comparison.new.problem}"
    )


def failed(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """The comparisons that make the exit status 1."""
    return [comparison for comparison in comparisons if verdict(comparison).startswith((REGRESSION, BROKEN))]


# ---------------------------------------------------------------- the report


def table(comparisons: Iterable[Comparison]) -> list[tuple[str, ...]]:
    """A row for each case."""
    table_rows = []
    for comparison in comparisons:
        case = comparison.case
        ratios = [comparison.ratio, Comparison(case, *comparison.second_run).ratio if comparison.second_run else None]
        rows_and_mean = f"{case.rows} x {case.tokens / max(case.rows, 1):.0f}"
        table_rows.append((
            case.op, distribution_label(case.law, case.source), rows_and_mean, case.sizes, case.dtype,
            str(case.threads), case.direction, _time(comparison.old), _time(comparison.new),
            ", ".join(f"{ratio:.2f}" for ratio in ratios if ratio) or "-", verdict(comparison),
        ))  # fmt: skip
    return table_rows


def _time(tree: TreeTiming) -> str:
    """The median, the quartiles, and the number of samples."""
    if tree.time is None:
        return "-"
    unit, scale = ("s", 1.0) if tree.time.median >= 1 else ("ms", 1e3)
    low, median, high = (f"{x * scale:.3g}" for x in (tree.time.low, tree.time.median, tree.time.high))
    return f"{median} {unit} ({low}..{high}, {tree.time.samples})"


def summary(comparisons: Sequence[Comparison]) -> str:
    """The number of cases with each verdict."""
    counts = Counter(verdict(comparison).partition(":")[0] for comparison in comparisons)
    return f"{len(comparisons)} lines: {', '.join(f'{number} {name}' for name, number in counts.most_common())}."


def show(heading: str, comparisons: Sequence[Comparison]) -> None:
    """Print the table, the rule and the summary."""
    print_table(heading, COLUMNS, table(comparisons))
    print(f"{RULE}\n{summary(comparisons)}")


def write(folder: Path, heading: str, comparisons: Sequence[Comparison]) -> None:
    """Write `compare.md` and `compare.json`."""
    text = [f"# {heading}", summary(comparisons), rows(COLUMNS, table(comparisons)), RULE]
    write_text(folder / "compare.md", "\n\n".join(text) + "\n")
    content = {
        "heading": heading,
        "rule": RULE,
        "lines": [_as_json(comparison) for comparison in comparisons],
    }
    write_text(folder / "compare.json", to_json(content))


def _as_json(comparison: Comparison) -> dict[str, Any]:
    second_run = comparison.second_run and [asdict(tree) for tree in comparison.second_run]
    return {
        "line": asdict(comparison.case),
        "old": asdict(comparison.old),
        "new": asdict(comparison.new),
        "again": second_run,
        "verdict": verdict(comparison),
    }
