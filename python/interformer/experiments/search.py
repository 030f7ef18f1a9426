"""Tuning: the search grids of variants, with one seed, ranked by validation AUC. The test part is not read."""

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
    """A trial for every point of every grid, with the first seed of its variant.

    Raises:
        ValueError: no variant has a `search`.
    """
    all_trials = []
    for variant in variants:
        for point, changed in trials(variant) if variant.search else ():
            named = replace(changed, name=f"{variant.name}-{_format_point(point, '-')}", seeds=variant.seeds[:1])
            (job,) = jobs_of(plan, [named], folder, machine, clicks=clicks, measure_test=False)
            all_trials.append(Trial(variant.name, point, job))
    if not all_trials:
        raise ValueError(f"{plan.name}: --tune needs a variant with a search, found none")
    return all_trials


def write(plan: Plan, tried: Sequence[Trial], folder: Path) -> str:
    """Write `tune.json` and `tune.md`, best first for each variant; returns the text of the latter."""
    lines, ranked = [f"# {plan.name}: tuning", "", "Validation alone, one seed.", ""], []
    lines += ["| variant | settings | valid AUC | best epoch | seconds |", "|---|---|---:|---:|---:|"]
    for name in dict.fromkeys(trial.variant for trial in tried):
        finished = [(trial, read_sealed(trial.job.result)["report"]) for trial in tried if trial.job.finished()]
        of_variant = [(trial, report) for trial, report in finished if trial.variant == name]
        for trial, report in sorted(of_variant, key=lambda pair: -(pair[1]["valid"]["auc"] or 0)):
            point, auc = _format_point(trial.point, ", "), number(report["valid"]["auc"])
            best = report["best_epoch"] + 1
            lines.append(f"| {name} | {point} | {auc:.4f} | {best} | {report['seconds']:.0f} |")
            valid = {"valid": report["valid"], "best_epoch": report["best_epoch"], "seconds": report["seconds"]}
            ranked.append({"variant": name, "settings": dict(trial.point), **valid})
    write_text(folder / "tune.json", to_json(ranked))
    text = "\n".join(lines) + "\n"
    write_text(folder / "tune.md", text)
    return text


def _format_point(point: Mapping[str, Any], separator: str) -> str:
    return separator.join(
        f"{key}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}" for key, value in point.items()
    )
