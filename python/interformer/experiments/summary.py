"""What finished runs come to: means over seeds with their standard errors, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from interformer.experiments.plan import Variant
from interformer.experiments.runs import Job
from interformer.files import read_sealed

METRICS = ("auc", "gauc", "logloss", "ne")
Reports = Mapping[int, Mapping[str, Any]]  # by seed


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error, which one seed alone does not have (NaN)."""

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """`mean`, and `std / sqrt(n)` with the sample's standard deviation (`n - 1`)."""
        found = np.asarray(values, np.float64)
        error = float(found.std(ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        return cls(float(found.mean()), error, len(found))


@dataclass(frozen=True)
class Row:
    """A variant in the table.

    Args:
        name, kind, group: as in the plan.
        seeds: those that are finished.
        valid_auc: at the best epoch.
        test: estimates by metric; none where the test part was not measured.
        difference: of the test AUC (validation AUC without a test part) to the reference variant's under the same seed;
            None for the reference itself and where no seed is common.
        parameters: numbers in the model's parameters.
        step_ms: median over seeds of each run's median training step.
        peak_mib: the highest of the runs' peaks.
        seconds: of all runs together.
        curves: validation AUC by epoch, a list a seed.
    """

    name: str
    kind: str
    group: str | None
    seeds: tuple[int, ...]
    valid_auc: Estimate
    test: dict[str, Estimate]
    difference: Estimate | None
    parameters: int
    step_ms: float
    peak_mib: float
    seconds: float
    curves: list[list[float]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def auc(self) -> Estimate:
        """Of the test part, where that was measured."""
        return self.test.get("auc", self.valid_auc)


def reports_of(jobs: Iterable[Job]) -> dict[int, dict[str, Any]]:
    """The reports of those runs that are finished, by seed."""
    return {job.identity["training"]["seed"]: read_sealed(job.result)["report"] for job in jobs if job.finished()}


def summarize(variants: Iterable[Variant], reports: Mapping[str, Reports], reference: str) -> list[Row]:
    """A row for each variant that has finished runs."""
    against = {seed: _auc(report) for seed, report in reports.get(reference, {}).items()}
    return [_row(variant, reports[variant.name], against, reference) for variant in variants if reports[variant.name]]


def _row(variant: Variant, reports: Reports, against: Mapping[int, float], reference: str) -> Row:
    runs = list(reports.values())
    common = [seed for seed in reports if seed in against] if variant.name != reference else []
    measured = all(run["test"] is not None for run in runs)
    return Row(
        name=variant.name,
        kind=variant.kind,
        group=variant.group,
        seeds=tuple(reports),
        valid_auc=Estimate.of([number(run["valid"]["auc"]) for run in runs]),
        test={name: Estimate.of([number(run["test"][name]) for run in runs]) for name in METRICS if measured},
        difference=Estimate.of([_auc(reports[seed]) - against[seed] for seed in common]) if common else None,
        parameters=runs[0]["parameters"],
        step_ms=float(np.median([run["step_ms"] for run in runs])),
        peak_mib=max(run["peak_mib"] for run in runs),
        seconds=sum(run["seconds"] for run in runs),
        curves=[[number(record["valid"]["auc"]) for record in run["history"]] for run in runs],
    )


def _auc(report: Mapping[str, Any]) -> float:
    return number((report["test"] or report["valid"])["auc"])


def number(value: float | None) -> float:
    """A number as JSON keeps it: null where it is not defined."""
    return math.nan if value is None else value
