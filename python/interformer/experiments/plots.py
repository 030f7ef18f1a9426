"""Plots of the summary: for each group, learning curves and a bar chart with the reference variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from interformer.experiments.summary import Estimate, Row
from interformer.files import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NO_GROUP = "all"


def draw(rows: Sequence[Row], reference: str, folder: Path) -> list[Path]:
    """Write `curves-<group>.png` and `bars-<group>.png`; the reference variant is in every group."""
    paths = []
    for group, members in groups(rows, reference).items():
        for kind, picture in (("curves", _curves), ("bars", _bars)):
            figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
            picture(axes, members, reference)
            axes.set_title(group)
            path = folder / f"{kind}-{group}.png"
            with replacing(path) as file:
                figure.savefig(file, dpi=120, format="png")
            plt.close(figure)
            paths.append(path)
    return paths


def groups(rows: Sequence[Row], reference: str) -> dict[str, list[Row]]:
    """Rows by group, the reference first; rows without a group (except the reference) form a group of their own."""
    by_group: dict[str, list[Row]] = {}
    for row in rows:
        if row.group is not None or row.name != reference:
            by_group.setdefault(row.group or NO_GROUP, []).append(row)
    if not by_group:
        return {NO_GROUP: list(rows)}
    reference_rows = [row for row in rows if row.name == reference]
    return {
        group: reference_rows + [row for row in members if row not in reference_rows]
        for group, members in by_group.items()
    }


def _curves(axes: plt.Axes, rows: Sequence[Row], reference: str) -> None:
    for row in rows:
        estimates = [Estimate.from_values(values) for values in by_epoch(row.curves)]
        epoch, mean = np.arange(1, len(estimates) + 1), np.array([estimate.mean for estimate in estimates])
        error = np.array([0.0 if math.isnan(estimate.error) else estimate.error for estimate in estimates])
        (line,) = axes.plot(epoch, mean, marker="o", linewidth=2.5 if row.name == reference else 1.2, label=row.name)
        axes.fill_between(epoch, mean - error, mean + error, alpha=0.2, color=line.get_color())
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation AUC, mean and standard error")
    axes.legend(fontsize="small")


def by_epoch(curves: Sequence[Sequence[float]]) -> list[list[float]]:
    """The values of each epoch, over the seeds that were still in training."""
    longest = max(map(len, curves))
    return [[curve[epoch] for curve in curves if epoch < len(curve)] for epoch in range(longest)]


def _bars(axes: plt.Axes, rows: Sequence[Row], reference: str) -> None:
    means = np.array([row.auc.mean for row in rows])
    errors = np.array([0.0 if math.isnan(row.auc.error) else row.auc.error for row in rows])
    colors = ["tab:orange" if row.name == reference else "tab:blue" for row in rows]
    axes.barh([row.name for row in rows], means, xerr=errors, color=colors, capsize=3)
    axes.invert_yaxis()
    low, high = np.nanmin(means - errors), np.nanmax(means + errors)
    margin = max(high - low, 1e-4) * 0.3
    axes.set_xlim(low - margin, high + margin)
    measured = all(row.test for row in rows)
    axes.set_xlabel(
        f"{'test' if measured else 'validation'} AUC, mean and standard error (the axis does not begin at 0)"
    )
