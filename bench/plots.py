"""Pictures: ratios to the best peer, shares of the machine's limits, and times beside the parity rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interformer_bench import report, targets
from interformer_bench.peers import OURS
from interformer_bench.report import Group, Machine
from interformer_bench.run import PASSES, Measurement

from interformer_kernels._files import replacing


def panels(count: int, height: float) -> tuple[Any, Any]:
    """A figure of so many panels side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, count, figsize=(6.5 * count, height), layout="constrained", squeeze=False)


def save(path: Path, figure: Any) -> None:
    """Write it, and let it go."""
    import matplotlib.pyplot as plt

    with replacing(path) as file:
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)


def _lines(measurements: Sequence[Measurement], direction: str) -> list[Group]:
    """The groups of one pass, on the largest number of threads."""
    most = max((one.threads for one in measurements), default=0)
    return [
        group
        for group in report.groups(measurements)
        if group[OURS].direction == direction and group[OURS].threads == most and group[OURS].median
    ]


def _label(one: Measurement) -> str:
    return f"{one.op}, {one.law}, {one.sizes}, {'bf16' if one.dtype == 'bfloat16' else one.dtype}"


def _bars(axis: Any, labels: Sequence[str], ends: Sequence[float], colours: Sequence[str], start: float) -> None:
    """A bar per label, from `start` to its end, and a line at 1."""
    axis.barh(range(len(labels)), [end - start for end in ends], left=start, color=colours)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(y=0.01)
    axis.set_yticks(range(len(labels)), labels, fontsize=6)
    axis.invert_yaxis()


def ratios(path: Path, measurements: Sequence[Measurement]) -> None:
    """Ratio to the best peer per shape: red below the floor, and a line at 1."""
    widest = max((len(_lines(measurements, direction)) for direction in PASSES), default=0)
    figure, axes = panels(len(PASSES), 2 + 0.16 * widest)
    for axis, direction in zip(axes[0], PASSES, strict=True):
        found = [(group[OURS], report.ratio(group)) for group in _lines(measurements, direction)]
        drawn = [(one, times) for one, times in found if times is not None]
        colours = ["tab:red" if times < targets.FLOOR else "tab:blue" for _, times in drawn]
        _bars(axis, [_label(one) for one, _ in drawn], [times for _, times in drawn], colours, start=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="x", which="both", labelsize=7, pad=4)
        axis.set_title(direction)
        axis.set_xlabel("times as fast as the best peer (log scale)")
    save(path, figure)


def limits(path: Path, measurements: Sequence[Measurement], machine: Machine) -> None:
    """Share of the nearer limit per shape: blue where it is the matrix products, orange where it is the copies."""
    widest = max((len(_lines(measurements, direction)) for direction in PASSES), default=0)
    figure, axes = panels(len(PASSES), 2 + 0.16 * widest)
    for axis, direction in zip(axes[0], PASSES, strict=True):
        found = [(group[OURS], report.of_limit(group[OURS], machine)) for group in _lines(measurements, direction)]
        drawn = [(one, limit) for one, limit in found if limit is not None]
        colours = ["tab:blue" if limit[0] == "GEMM" else "tab:orange" for _, limit in drawn]
        _bars(axis, [_label(one) for one, _ in drawn], [limit[1] for _, limit in drawn], colours, start=0)
        axis.set_title(direction)
        axis.set_xlabel("share of the nearer limit (blue: products, orange: copies)", fontsize=9)
    save(path, figure)


# ---------------------------------------------------------------- times, and parity


def times(path: Path, measurements: Sequence[Measurement], parity: Sequence[Any] = ()) -> None:
    """Time of every runner per shape, and (where given) each parity row's error against its budget.

    Args:
        path: of the PNG.
        measurements: drawn as bars, quartiles as whiskers.
        parity: objects with `op`, `backend`, `dtype`, `quantity` and `share` (error / budget; above 1 is a breach).
    """
    figure, axes = panels(3 if parity else 2, 7)
    for axis, direction in zip(axes[0], PASSES, strict=False):
        _draw_times(axis, _lines(measurements, direction))
        axis.set_title(direction)
    if parity:
        _draw_parity(axes[0][2], parity)
    save(path, figure)


def _draw_times(axis: Any, shapes: list[Group]) -> None:
    names = list(dict.fromkeys(name for group in shapes for name in group))
    height = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        timed = [
            (at, group[name]) for at, group in enumerate(shapes) if name in group and group[name].median is not None
        ]
        middle = [(one.median or 0) * 1e3 for _, one in timed]
        reach = [
            [(one.median - one.low) * 1e3 for _, one in timed],  # type: ignore[operator]
            [(one.high - one.median) * 1e3 for _, one in timed],  # type: ignore[operator]
        ]
        axis.barh([at + i * height for at, _ in timed], middle, height, xerr=reach, label=name)
    labels = [f"{group[OURS].op}\n{group[OURS].law}" for group in shapes]
    axis.set_yticks([at + 0.4 - height / 2 for at in range(len(shapes))], labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("ms (log scale)")
    axis.legend(fontsize=6)


def _draw_parity(axis: Any, parity: Sequence[Any]) -> None:
    keys = list(dict.fromkeys((row.op, row.backend, row.dtype) for row in parity))
    for at, key in enumerate(keys):
        # What could not be compared at all has an infinite share: it is drawn at the edge, not left out.
        shares = [min(row.share, 2.0) for row in parity if (row.op, row.backend, row.dtype) == key]
        axis.plot(shares, [at] * len(shares), "o", color="tab:red" if max(shares) > 1 else "tab:green", ms=4)
    axis.axvline(1, color="tab:red", linestyle="--")
    axis.set_yticks(range(len(keys)), [" ".join(key) for key in keys], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("error / budget, output and each gradient (1 is the limit)")
    axis.set_title("parity with float64")
