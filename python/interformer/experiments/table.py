"""The summary as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from interformer.experiments.summary import Estimate, Row

METRIC_TITLES = {"auc": "test AUC", "gauc": "gAUC", "logloss": "LogLoss", "ne": "NE"}
COSTS = ("parameters", "MFLOP a candidate, of 1 / of 100", "step ms", "scored / s", "peak MiB", "total s")
HEADER = ("variant", "group", "seeds", *METRIC_TITLES.values(), "valid AUC", "AUC - reference", *COSTS)


def table(name: str, rows: Sequence[Row], reference: str) -> str:
    """The whole page: an explanation and a line per variant, in the order of the plan."""
    lines = [
        f"# {name}",
        "",
        "Mean over seeds +- standard error. The difference of test AUC is paired with the run of "
        f"`{reference}` with the same seed. Step: median of the training steps; peak: of the process' resident set "
        "(CUDA: of the allocator); total: all seeds, validation included. MFLOP: to score one of "
        "1 and of 100 candidates of a request; scored / s: impressions of the validation part, by the run's threads.",
        "",
        _line(HEADER),
        _line(["---", "---", *["---:"] * (len(HEADER) - 2)]),
        *(_line(_cells(row)) for row in rows),
        "",
        f"All runs: {sum(row.seconds for row in rows):,.0f} s of training and measuring.",
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        row.group or "",
        str(len(row.seeds)),
        *(format_estimate(row.test.get(metric)) for metric in METRIC_TITLES),
        format_estimate(row.valid_auc),
        format_estimate(row.difference, signed=True),
        f"{row.parameters:,}",
        " / ".join(f"{flops / 1e6:.3g}" for flops in row.flops.values()) if row.flops else "-",
        f"{row.step_ms:.2f}",
        f"{row.impressions_per_second:,.0f}" if row.impressions_per_second else "-",
        f"{row.peak_mib:.0f}",
        f"{row.seconds:.0f}",
    ]


def format_estimate(estimate: Estimate | None, *, signed: bool = False) -> str:
    """`0.7512 +- 0.0008`, without an error for one seed; `-` without an estimate."""
    if estimate is None or math.isnan(estimate.mean):
        return "-"
    mean = f"{estimate.mean:{'+' if signed else ''}.4f}"
    return mean if math.isnan(estimate.error) else f"{mean} +- {estimate.error:.4f}"
