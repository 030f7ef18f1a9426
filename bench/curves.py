"""Pictures with two axes: time against length, batch and fill, and the roofline with the ceilings of the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interformer_bench import plots, report
from interformer_bench.peers import OURS
from interformer_bench.report import Machine
from interformer_bench.run import PASSES, Measurement
from interformer_bench.sweeps import Sweep


def sweep(path: Path, about: Sweep, measured: Sequence[Measurement]) -> None:
    """Median and quartiles of every runner along the axis, a panel for each pass."""
    names = list(dict.fromkeys(one.runner for one in measured))
    figure, axes = plots.panels(len(PASSES), 5.2)
    for axis, direction in zip(axes[0], PASSES, strict=True):
        for name in names:
            own = [one for one in measured if one.runner == name and one.direction == direction]
            _curve(axis, about, name, own)
        _scales(axis, about)
        axis.set_title(direction)
        axis.set_xlabel(about.label)
        axis.set_ylabel("time of a call, ms")
    figure.suptitle(about.title())
    _legend_below(figure, axes[0])
    plots.save(path, figure)


def _curve(axis: Any, about: Sweep, name: str, own: Sequence[Measurement]) -> None:
    timed = [one for one in own if one.median is not None]
    missing = f" (not timed at {len(own) - len(timed)} of {len(own)})" if len(timed) < len(own) else ""
    middle = [(one.median or 0.0) * 1e3 for one in timed]
    reach = [
        [(one.median - one.low) * 1e3 for one in timed],  # type: ignore[operator]
        [(one.high - one.median) * 1e3 for one in timed],  # type: ignore[operator]
    ]
    ours = {"linewidth": 2.2, "color": "black", "zorder": 3} if name == OURS else {"linewidth": 1.2}
    places = [about.at(one) for one in timed]
    axis.errorbar(places, middle, yerr=reach, label=name + missing, marker="o", markersize=4, capsize=2, **ours)


def _scales(axis: Any, about: Sweep) -> None:
    axis.set_yscale("log")
    _plain_decades(axis.yaxis)
    axis.grid(which="major", alpha=0.4)
    if about.axis == "fill":
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
    """One legend for all panels, below them; what is the same in two panels stands once."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=5, fontsize=8, frameon=False)


# ---------------------------------------------------------------- the roofline


def roofline(path: Path, measurements: Sequence[Measurement], machine: Machine) -> None:
    """This package's FLOP/s over FLOPs per byte, below the rates of products and copies in the same run."""
    most = max((one.threads for one in measurements), default=0)
    ours = [one for one in measurements if one.runner == OURS and one.threads == most and one.median]
    ops = list(dict.fromkeys(one.op for one in ours))
    figure, axes = plots.panels(len(PASSES), 5.6)
    for axis, direction in zip(axes[0], PASSES, strict=True):
        here = [one for one in ours if one.direction == direction]
        for dtype, style in (("float32", "-"), ("bfloat16", "--")):
            _ceiling(axis, here, dtype, style, machine)
        for at, op in enumerate(ops):
            _points(axis, [one for one in here if one.op == op], f"C{at}")
        axis.set_xscale("log")
        axis.set_yscale("log")
        _plain_decades(axis.xaxis)
        _plain_decades(axis.yaxis)
        axis.grid(which="major", alpha=0.4)
        axis.set_title(f"{direction}, {most} threads")
        axis.set_xlabel("FLOP / byte, of what must be computed and moved")
        axis.set_ylabel("GFLOP/s")
    figure.suptitle("Reached by this package, below what the machine did in the same run")
    _legend_below(figure, axes[0])
    plots.save(path, figure)


def _ceiling(axis: Any, here: Sequence[Measurement], dtype: str, style: str, machine: Machine) -> None:
    """Copies up to the ridge, products from there on, as wide as the points and the ridge are."""
    own = [one for one in here if one.dtype == dtype]
    rates = report.ceilings(machine, dtype, own[0].threads) if own else None
    if rates is None:
        return
    ridge = rates.gemm / rates.copy
    densities = [one.flops / one.bytes for one in own]
    left, right = min(*densities, ridge) / 2, max(*densities, ridge) * 2
    heights = [min(rates.gemm, x * rates.copy) / 1e9 for x in (left, ridge, right)]
    label = f"{dtype}: products {rates.gemm / 1e9:.3g} GFLOP/s, copies {rates.copy / 1e9:.3g} GB/s"
    axis.plot([left, ridge, right], heights, style, color="black", linewidth=1.4, label=label)


def _points(axis: Any, own: Sequence[Measurement], colour: str) -> None:
    """Full for float32, hollow for other dtypes."""
    for full in (True, False):
        here = [one for one in own if (one.dtype == "float32") == full]
        if here:
            x = [one.flops / one.bytes for one in here]
            y = [one.flops / (one.median or 1.0) / 1e9 for one in here]
            fill = colour if full else "none"
            label = here[0].op if full else f"{here[0].op}, 16 bits"
            axis.scatter(x, y, s=26, facecolors=fill, edgecolors=colour, label=label, zorder=3)
