"""Pictures of speed: times as fast as the best peer, share of the machine's limit, and parity, on one page.

A committed table of results is drawn again without measuring anything:
`python -m interformer_bench.plots bench/results/cpu-avx512-intel.md --out docs/images/speed.png`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interformer_bench import quiet, report, targets
from interformer_bench.peers import OURS
from interformer_bench.report import Machine
from interformer_bench.result_tables import Result, read_results
from interformer_bench.run import PASSES, Measurement

from interformer_kernels._files import replacing

# Okabe and Ito's colours, which stay apart for colour-blind readers.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#5A5A5A"
_TEXT = 11


def panels(count: int, height: float) -> tuple[Any, Any]:
    """A figure of so many panels side by side."""
    return _pyplot().subplots(1, count, figsize=(6.5 * count, height), layout="constrained", squeeze=False)


def save(path: Path, figure: Any) -> None:
    """Write the figure as PNG, and release it."""
    with replacing(path) as file:
        figure.savefig(file, dpi=130, format="png")
    _pyplot().close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# ---------------------------------------------------------------- speed


@dataclass(frozen=True)
class Bar:
    """One op on one distribution of lengths: the forward and the training pass, where they were measured."""

    label: str
    shape: str
    forward: Result | None = None
    training: Result | None = None

    @property
    def shown(self) -> Result | None:
        """The pass of the bar: training, or the forward where nothing else was measured."""
        return self.training or self.forward


def results_of(measurements: Sequence[Measurement], machine: Machine) -> list[Result]:
    """One result for each shape, dtype and pass that has a best peer, on the largest number of threads.

    There is none for a line on which the machine was busy.
    """
    threads = max((measurement.threads for measurement in measurements), default=0)
    results = []
    for group in report.groups(measurements):
        ours, peer, ratio = group[OURS], report.best_peer(group), report.ratio(group)
        if ours.threads != threads or peer is None or ratio is None:
            continue
        shape = f"{ours.rows} x {ours.tokens / max(ours.rows, 1):.0f} ({ours.longest})"
        limit = report.of_limit(ours, machine) or ("", math.nan)
        lengths = ours.law if ours.source == "synthetic" else f"{ours.law} ({ours.source})"
        case = ours.op, lengths, shape, ours.sizes, ours.dtype, ours.direction
        results.append(Result(*case, ratio, peer.runner, *limit[::-1], f"{ratio:.2f}x"))
    return results


def busy_note(measurements: Sequence[Measurement]) -> list[str]:
    """For titles: on how many lines the machine was busy; nothing where it was quiet."""
    busy = sum(bool(group[OURS].busy) for group in report.groups(measurements))
    return [f"{quiet.NO_RATIO} for {busy} lines"] if busy else []


def bars_by_op(results: Iterable[Result], dtype: str = "float32", lengths: Sequence[str] = ()) -> dict[str, list[Bar]]:
    """The bars of each op, in the order of the results; `lengths` names the distributions to take, none takes all."""
    passes: dict[tuple[str, str, str, str], dict[str, Result]] = {}
    for result in results:
        if result.dtype == dtype and (not lengths or result.lengths.partition(" (")[0] in lengths):
            key = result.op, result.lengths, result.shape, result.sizes
            passes.setdefault(key, {})[result.direction] = result
    bars: dict[str, list[Bar]] = {}
    for (op, name, shape, sizes), by_pass in passes.items():
        twice = sum(key[:3] == (op, name, shape) for key in passes) > 1
        rows = shape.partition(" (")[0]
        label = f"{name}, {sizes}" if twice else name
        bars.setdefault(op, []).append(Bar(label, rows, *(by_pass.get(direction) for direction in PASSES)))
    return bars


def speed(
    path: Path, results: Iterable[Result], parity: Sequence[Any] = (), *, dtype: str = "float32", title: str = ""
) -> None:
    """Draw the bars of one dtype, and below them the parity strip where parity results are given.

    Args:
        path: PNG file to write.
        results: of `results_of`, or of a committed table (`read_results`).
        parity: objects with `op`, `backend`, `dtype` and `share` (error / budget; above 1 is a breach).
        dtype: dtype to draw.
        title: machine and date, in the heading.
    """
    draw(path, bars_by_op(results, dtype), parity, title)


def draw(path: Path, bars: Mapping[str, Sequence[Bar]], parity: Sequence[Any] = (), title: str = "") -> None:
    """Draw bars that are grouped by op: ratio to the best peer, share of the limit, and parity below them."""
    slots = sum(1.25 + len(group) for group in bars.values())
    strip = 0.75 + 0.25 * len({(row.backend, row.dtype) for row in parity}) if parity else 0.0
    heights = [0.28 * max(slots, 2) + 0.35, *([strip] if strip else [])]
    figure = _pyplot().figure(figsize=(10.5, sum(heights) + 1.35), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=[3.1, 1])
    ratio_axis = figure.add_subplot(grid[0, 0])
    limit_axis = figure.add_subplot(grid[0, 1], sharey=ratio_axis)
    places, labels = _places(bars)
    _draw_ratios(ratio_axis, places)
    _draw_limits(limit_axis, places)
    _label_rows(ratio_axis, labels, slots)
    if parity:
        _draw_parity(figure.add_subplot(grid[1, :]), parity)
    heading = "Times as fast as the fastest correct peer"
    figure.suptitle(f"{heading}\n{title}" if title else heading, fontsize=_TEXT + 3)
    save(path, figure)


_Places = list[tuple[float, Bar]]


def _places(bars: Mapping[str, Sequence[Bar]]) -> tuple[_Places, list[tuple[float, str, str]]]:
    """The bars and the row labels (text, shape), each with its y; the heading of an op has no shape."""
    places, labels, y = [], [], 0.0
    for op, group in bars.items():
        labels.append((y, op, ""))
        y += 1
        for bar in group:
            places.append((y, bar))
            labels.append((y, bar.label, bar.shape))
            y += 1
        y += 0.25
    return places, labels


def _label_rows(axis: Any, labels: Sequence[tuple[float, str, str]], slots: float) -> None:
    axis.set_ylim(slots - 0.5, -0.7)
    axis.set_yticks([])
    at_axis = {"xycoords": axis.get_yaxis_transform(), "textcoords": "offset points", "va": "center", "ha": "right"}
    for y, text, shape in labels:
        if shape:
            axis.annotate(text, (0, y), (-78, 0), fontsize=_TEXT, **at_axis)
            axis.annotate(shape, (0, y), (-6, 0), fontsize=_TEXT - 2, color=GREY, **at_axis)
        else:
            axis.annotate(text, (0, y), (-6, 0), fontsize=_TEXT + 1, fontweight="bold", **at_axis)


def _draw_ratios(axis: Any, places: _Places) -> None:
    ratios = [result.ratio for _, bar in places for result in (bar.forward, bar.training) if result]
    for y, bar in places:
        if bar.shown is None:
            continue
        ratio = bar.shown.ratio
        colour = VERMILION if ratio < targets.FLOOR else BLUE
        axis.barh(y, ratio - 1, left=1, height=0.7, color=colour)
        if bar.training and bar.forward:
            axis.plot(bar.forward.ratio, y, "D", color="white", markeredgecolor="black", ms=6.5, zorder=3)
        end = max(1.0, ratio, bar.forward.ratio if bar.forward else 0)
        axis.annotate(
            f"{ratio:.1f}x  {bar.shown.peer}", (end, y), (8, 0), textcoords="offset points", va="center", fontsize=_TEXT
        )
    axis.axvline(1, color="black", linewidth=1.5)
    axis.set_xscale("log")
    # The text behind the longest bar needs about as much room again.
    low, high = min([0.8, *(0.85 * ratio for ratio in ratios)]), max([2.0, *ratios])
    axis.set_xlim(low, high * (high / low) ** 0.62)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= tick <= 1.05 * high]
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], fontsize=_TEXT)
    axis.minorticks_off()
    axis.grid(axis="x", color="0.88")
    axis.set_axisbelow(True)
    passes = "bar: forward and backward;  diamond: forward alone"
    axis.set_xlabel(f"beyond the line at 1x: faster than the best peer\n{passes}", fontsize=_TEXT)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _draw_limits(axis: Any, places: _Places) -> None:
    for y, bar in places:
        result = bar.shown
        if result is None or not math.isfinite(result.share):
            continue
        colour, name = (GREEN, "products") if result.limit == "GEMM" else (ORANGE, "copies")
        axis.barh(y, 1, height=0.7, color="0.93")
        axis.barh(y, min(result.share, 1), height=0.7, color=colour)
        axis.text(1.04, y, f"{result.share:.0%} {name}", va="center", fontsize=_TEXT)
    axis.set_xlim(0, 1.75)
    axis.set_xticks([0, 0.5, 1], ["0", "50%", "100%"], fontsize=_TEXT)
    axis.set_xlabel("share of the machine's nearer\nlimit: products or copies", fontsize=_TEXT)
    axis.tick_params(axis="y", left=False, labelleft=False)
    axis.spines[["top", "right", "left"]].set_visible(False)


# ---------------------------------------------------------------- parity


def _draw_parity(axis: Any, parity: Sequence[Any]) -> None:
    """A cell for each op under each backend and dtype: its largest share of the error budget."""
    ops = list(dict.fromkeys(row.op for row in parity))
    lines = list(dict.fromkeys((row.backend, row.dtype) for row in parity))
    for y, (backend, dtype) in enumerate(lines):
        for x, op in enumerate(ops):
            shares = [row.share for row in parity if (row.op, row.backend, row.dtype) == (op, backend, dtype)]
            _draw_cell(axis, x, y, max(shares, default=None))
    axis.set_xlim(-0.5, len(ops) - 0.5)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_xticks(range(len(ops)), [op.replace("_", "_\n", 1) for op in ops], fontsize=_TEXT)
    axis.set_yticks(range(len(lines)), [" ".join(line) for line in lines], fontsize=_TEXT)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title("Parity with float64: largest error / its budget (above 1 is a breach)", fontsize=_TEXT + 1)


def _draw_cell(axis: Any, x: float, y: float, share: float | None) -> None:
    if share is None:
        return
    colour = VERMILION if share > 1 else "#CFE8DD"
    # A comparison that failed altogether has an infinite share.
    text = "failed" if math.isinf(share) else f"{share:.2f}"
    axis.barh(y, 0.96, left=x - 0.48, height=0.86, color=colour)
    axis.text(x, y, text, ha="center", va="center", fontsize=_TEXT)


# ---------------------------------------------------------------- from committed tables


@dataclass(frozen=True)
class _ParityCell:
    op: str
    backend: str
    dtype: str
    share: float


def read_parity(path: Path) -> list[_ParityCell]:
    """The results of `interformer-kernels parity --json`; a comparison without a share has failed."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [
        _ParityCell(row["op"], row["backend"], row["dtype"], math.inf if row["share"] is None else row["share"])
        for row in rows
    ]


def main() -> None:
    """Draw a committed table of results."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("results", type=Path, help="a table of bench/results, or the report.md of a run")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--parity", type=Path, help="JSON file of `interformer-kernels parity --json`")
    parser.add_argument("--dtype", default="float32", help="(default: %(default)s)")
    parser.add_argument("--lengths", nargs="+", default=(), metavar="NAME", help="these distributions alone")
    parser.add_argument("--title", default="", help="machine and date")
    options = parser.parse_args()
    bars = bars_by_op(read_results(options.results), options.dtype, options.lengths)
    draw(options.out, bars, read_parity(options.parity) if options.parity else (), options.title)


if __name__ == "__main__":
    main()
