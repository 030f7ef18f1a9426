"""Tuning: the grids of `search`, one seed, ranked by validation AUC. The test part is not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from interformer.experiments.plan import Plan, Variant, trials
from interformer.experiments.runs import Job, Machine, jobs_of
from interformer.experiments.summary import number
from interformer.files import read_sealed, to_json, write_text


@dataclass(frozen=True)
class Trial:
    """A variant at one point of its grid."""

    variant: str
    point: Mapping[str, Any]
    job: Job


def jobs(
    plan: Plan, variants: Iterable[Variant], folder: Path, machine: Machine, clicks: Mapping[str, int]
) -> list[Trial]:
    """Every point of every grid, under the first seed of its variant.

    Raises:
        ValueError: no variant has a `search`, or two points come to one name.
    """
    found = []
    for variant in variants:
        for point, changed in trials(variant) if variant.search else ():
            named = replace(changed, name=f"{variant.name}-{_in_words(point, '-')}", seeds=variant.seeds[:1])
            (job,) = jobs_of(plan, [named], folder, machine, clicks=clicks, measure_test=False)
            found.append(Trial(variant.name, point, job))
    if not found:
        raise ValueError(f"{plan.name}: --tune wants a variant with a search, found none")
    return found


def write(plan: Plan, tried: Sequence[Trial], folder: Path) -> str:
    """Writes `tune.json` and `tune.md`, best first for each variant; returns the latter."""
    lines, ranked = [f"# {plan.name}: tuning", "", "Validation alone, one seed.", ""], []
    lines += ["| variant | settings | valid AUC | best epoch | seconds |", "|---|---|---:|---:|---:|"]
    for name in dict.fromkeys(trial.variant for trial in tried):
        finished = [(trial, read_sealed(trial.job.result)["report"]) for trial in tried if trial.job.finished()]
        mine = [(trial, report) for trial, report in finished if trial.variant == name]
        for trial, report in sorted(mine, key=lambda pair: -(pair[1]["valid"]["auc"] or 0)):
            point, auc = _in_words(trial.point, ", "), number(report["valid"]["auc"])
            best = report["best_epoch"] + 1
            lines.append(f"| {name} | {point} | {auc:.4f} | {best} | {report['seconds']:.0f} |")
            valid = {"valid": report["valid"], "best_epoch": report["best_epoch"], "seconds": report["seconds"]}
            ranked.append({"variant": name, "settings": dict(trial.point), **valid})
    write_text(folder / "tune.json", to_json(ranked))
    text = "\n".join(lines) + "\n"
    write_text(folder / "tune.md", text)
    return text


def _in_words(point: Mapping[str, Any], between: str) -> str:
    return between.join(
        f"{key}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}" for key, value in point.items()
    )
