"""Line plots: time against length, batch and fill, and the roofline with the ceilings of the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interformer_bench import plots, report
from interformer_bench.peers import OURS
from interformer_bench.report import Machine
from interformer_bench.run import PASSES, Measurement
from interformer_bench.sweeps import Sweep


def sweep(path: Path, sweep: Sweep, measurements: Sequence[Measurement]) -> None:
    """Median and quartiles of every runner along the axis, a panel for each pass."""
    names = list(dict.fromkeys(m.runner for m in measurements))
    figure, axes = plots.panels(len(PASSES), 5.2)
    for axis, direction in zip(axes[0], PASSES, strict=True):
        for name in names:
            _curve(axis, sweep, name, [m for m in measurements if m.runner == name and m.direction == direction])
        _scales(axis, sweep)
        axis.set_title(direction)
        axis.set_xlabel(sweep.label)
        axis.set_ylabel("time of a call, ms")
    figure.suptitle(", ".join([sweep.title(), *plots.busy_note(measurements)]))
    _legend_below(figure, axes[0])
    plots.save(path, figure)


def _curve(axis: Any, sweep: Sweep, name: str, measurements: Sequence[Measurement]) -> None:
    timed = [m for m in measurements if m.median is not None]
    all_count, untimed_count = len(measurements), len(measurements) - len(timed)
    missing = f" (not timed at {untimed_count} of {all_count})" if untimed_count else ""
    medians = [(m.median or 0.0) * 1e3 for m in timed]
    quartile_distances = [
        [(m.median - m.low) * 1e3 for m in timed],  # type: ignore[operator]
        [(m.high - m.median) * 1e3 for m in timed],  # type: ignore[operator]
    ]
    style = {"linewidth": 2.2, "color": "black", "zorder": 3} if name == OURS else {"linewidth": 1.2}
    places = [sweep.at(m) for m in timed]
    bars = {"yerr": quartile_distances, "marker": "o", "markersize": 4, "capsize": 2}
    axis.errorbar(places, medians, label=name + missing, **bars, **style)


def _scales(axis: Any, sweep: Sweep) -> None:
    axis.set_yscale("log")
    _plain_decades(axis.yaxis)
    axis.grid(which="major", alpha=0.4)
    if sweep.axis == "fill":
        axis.set_xlim(0, 1.03)
        return
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")


def _plain_decades(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 of each decade, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _legend_below(figure: Any, axes: Sequence[Any]) -> None:
    """One legend below all panels; an entry that two panels share appears once."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = list(handles)
    figure.legend(list(handles.values()), labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


# ---------------------------------------------------------------- the roofline


def roofline(path: Path, measurements: Sequence[Measurement], machine: Machine) -> None:
    """This package's FLOP/s over FLOPs per byte, under the rates of products and copies in the same run."""
    max_threads = max((m.threads for m in measurements), default=0)
    ours = [m for m in measurements if m.runner == OURS and m.threads == max_threads and m.median and not m.busy]
    ops = list(dict.fromkeys(m.op for m in ours))
    figure, axes = plots.panels(len(PASSES), 5.6)
    for axis, direction in zip(axes[0], PASSES, strict=True):
        of_pass = [m for m in ours if m.direction == direction]
        for dtype, style in (("float32", "-"), ("bfloat16", "--")):
            _ceiling(axis, [m for m in of_pass if m.dtype == dtype], dtype, style, machine)
        for at, op in enumerate(ops):
            _points(axis, [m for m in of_pass if m.op == op], f"C{at}")
        axis.set_xscale("log")
        axis.set_yscale("log")
        _plain_decades(axis.xaxis)
        _plain_decades(axis.yaxis)
        axis.grid(which="major", alpha=0.4)
        axis.set_title(f"{direction}, {max_threads} threads")
        axis.set_xlabel("FLOP / byte, of what must be computed and moved")
        axis.set_ylabel("GFLOP/s")
    figure.suptitle("Reached by this package, below what the machine did in the same run")
    _legend_below(figure, axes[0])
    plots.save(path, figure)


def _ceiling(axis: Any, measurements: Sequence[Measurement], dtype: str, style: str, machine: Machine) -> None:
    """The copy rate up to the ridge, the GEMM rate from there on, as wide as the points and the ridge."""
    rates = report.ceilings(machine, dtype, measurements[0].threads) if measurements else None
    if rates is None:
        return
    ridge = rates.gemm / rates.copy
    densities = [m.flops / m.bytes for m in measurements]
    left, right = min(*densities, ridge) / 2, max(*densities, ridge) * 2
    heights = [min(rates.gemm, x * rates.copy) / 1e9 for x in (left, ridge, right)]
    label = f"{dtype}: products {rates.gemm / 1e9:.3g} GFLOP/s, copies {rates.copy / 1e9:.3g} GB/s"
    axis.plot([left, ridge, right], heights, style, color="black", linewidth=1.4, label=label)


def _points(axis: Any, measurements: Sequence[Measurement], colour: str) -> None:
    """Filled markers for float32, hollow ones for other dtypes."""
    for filled in (True, False):
        chosen = [m for m in measurements if (m.dtype == "float32") == filled]
        if chosen:
            x = [m.flops / m.bytes for m in chosen]
            y = [m.flops / (m.median or 1.0) / 1e9 for m in chosen]
            face = colour if filled else "none"
            label = chosen[0].op if filled else f"{chosen[0].op}, 16 bits"
            axis.scatter(x, y, s=26, facecolors=face, edgecolors=colour, label=label, zorder=3)
