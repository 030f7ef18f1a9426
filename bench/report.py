"""Measurements as a table (terminal or Markdown), as JSON, and as one picture beside the parity rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from interformer_bench.peers import OURS
from interformer_bench.run import Measurement
from interformer_bench.timing import Machine

COLUMNS = ("op", "lengths", "rows x mean (longest)", "pass", "interformer", "best peer", "ratio", "spread")


def groups(measurements: Iterable[Measurement]) -> list[dict[str, Measurement]]:
    """The runners of each (op, shape, pass), by name, in the order they were measured."""
    found: dict[tuple[object, ...], dict[str, Measurement]] = {}
    for one in measurements:
        key = one.op, one.law, one.rows, one.queries, one.heads, one.head_size, one.dtype, one.device, one.direction
        found.setdefault(key, {})[one.runner] = one
    return list(found.values())


def best_peer(group: dict[str, Measurement]) -> Measurement | None:
    """The fastest right peer."""
    timed = [one for name, one in group.items() if name != OURS and one.median is not None]
    return min(timed, key=lambda one: one.median or 0.0, default=None)


def table(measurements: Iterable[Measurement]) -> list[tuple[str, ...]]:
    """A line per (op, shape, pass): this package against its best peer; the spread is that of the quartiles."""
    lines = []
    for group in groups(measurements):
        ours, peer = group[OURS], best_peer(group)
        shape = f"{ours.rows} x {ours.tokens / max(ours.rows, 1):.0f} ({ours.longest})"
        law = ours.law if ours.source == "synthetic" else f"{ours.law} ({ours.source})"
        ratio = f"{peer.median / ours.median:.2f}x" if peer and peer.median and ours.median else "-"
        spread = f"{(ours.high - ours.low) / ours.median:.0%}" if ours.median and ours.high and ours.low else "-"
        mine = f"{_time(ours)} ({ours.backend})"
        theirs = f"{_time(peer)} ({peer.runner})" if peer else "none is right"
        lines.append((ours.op, law, shape, ours.direction, mine, theirs, ratio, spread))
    return lines


def problems(measurements: Iterable[Measurement]) -> list[str]:
    """What was not timed, and why; once per runner and shape."""
    return list(dict.fromkeys(f"{m.op} on {m.law}: {m.runner} {m.problem}" for m in measurements if m.problem))


def _time(one: Measurement) -> str:
    if one.median is None:
        return "-"
    return f"{one.median:.3g} s" if one.median >= 1 else f"{one.median * 1e3:.3g} ms"


def rates(machine: Machine) -> str:
    """The machine in words."""
    rate = f"GEMM {machine.gemm / 1e9:.0f} GFLOP/s, copy {machine.copy / 1e9:.1f} GB/s"
    return f"{rate}, in the same run; CPU threads: {machine.threads}"


def markdown(measurements: Sequence[Measurement], machine: Machine) -> str:
    """The table in Markdown, with the machine's rates under it."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *table(measurements)]
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([rows, rates(machine) + ".", *problems(measurements)]) + "\n"


def write_json(path: Path, measurements: Sequence[Measurement], machine: Machine) -> None:
    """All measurements and the machine's rates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": asdict(machine), "measurements": [asdict(one) for one in measurements]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def plot(path: Path, measurements: Sequence[Measurement], parity: Sequence[Any] = ()) -> None:
    """One picture: time of every runner per shape, and (where given) each parity row's error against its budget.

    Args:
        path: of the PNG.
        measurements: drawn as bars, quartiles as whiskers.
        parity: objects with `op`, `backend`, `dtype`, `quantity` and `share` (error / budget; above 1 is a breach).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = 3 if parity else 2
    figure, axes = plt.subplots(1, panels, figsize=(6 * panels, 7), layout="constrained")
    for axis, direction in zip(axes, ("forward", "forward+backward"), strict=False):
        _plot_times(axis, [group for group in groups(measurements) if group[OURS].direction == direction])
        axis.set_title(direction)
    if parity:
        _plot_parity(axes[2], parity)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_times(axis: Any, shapes: list[dict[str, Measurement]]) -> None:
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
    axis.set_yticks([at + 0.4 - height / 2 for at in range(len(shapes))], labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("ms (log scale)")
    axis.legend(fontsize=8)


def _plot_parity(axis: Any, parity: Sequence[Any]) -> None:
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
