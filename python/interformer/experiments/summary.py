"""Summary of finished runs: means over seeds with standard errors, and paired differences."""

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
    """A mean over seeds and its standard error, which is NaN for one seed."""

    mean: float
    error: float
    count: int

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Estimate:
        """The mean, and `std / sqrt(n)` with the sample's standard deviation (`n - 1`)."""
        sample = np.asarray(values, np.float64)
        error = float(sample.std(ddof=1)) / math.sqrt(len(sample)) if len(sample) > 1 else math.nan
        return cls(float(sample.mean()), error, len(sample))


@dataclass(frozen=True)
class Row:
    """A variant in the table.

    Args:
        name, kind, group: as in the plan.
        seeds: the finished ones.
        valid_auc: validation AUC at the best epoch.
        test: estimates by metric; empty if the test part was not measured.
        difference: difference of the test AUC (validation AUC without a test part) from the reference variant's with
            the same seed; None for the reference itself, and without common seeds.
        parameters: number of the model's parameters.
        step_ms: median over seeds of each run's median training step.
        impressions_per_second: median over seeds, of evaluation; None for runs that did not measure it.
        flops: FLOPs of a candidate's logit by the number of candidates of a request; None where not counted.
        peak_mib: the highest of the runs' peaks.
        seconds: total duration of the runs.
        curves: validation AUC by epoch, one list per seed.
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
    impressions_per_second: float | None
    flops: dict[str, float] | None
    peak_mib: float
    seconds: float
    curves: list[list[float]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def auc(self) -> Estimate:
        """Test AUC if it was measured, else validation AUC."""
        return self.test.get("auc", self.valid_auc)


def reports_of(jobs: Iterable[Job]) -> dict[int, dict[str, Any]]:
    """The reports of finished runs, by seed."""
    return {job.identity["training"]["seed"]: read_sealed(job.result)["report"] for job in jobs if job.finished()}


def summarize(variants: Iterable[Variant], reports: Mapping[str, Reports], reference: str) -> list[Row]:
    """A row for each variant that has finished runs."""
    reference_auc = {seed: _auc(report) for seed, report in reports.get(reference, {}).items()}
    return [
        _row(variant, reports[variant.name], reference_auc, reference) for variant in variants if reports[variant.name]
    ]


def _row(variant: Variant, reports: Reports, reference_auc: Mapping[int, float], reference: str) -> Row:
    runs = list(reports.values())
    common = [seed for seed in reports if seed in reference_auc] if variant.name != reference else []
    measured = all(run["test"] is not None for run in runs)
    rates = [run["impressions_per_second"] for run in runs if "impressions_per_second" in run]
    return Row(
        name=variant.name,
        kind=variant.kind,
        group=variant.group,
        seeds=tuple(reports),
        valid_auc=Estimate.from_values([number(run["valid"]["auc"]) for run in runs]),
        test={name: Estimate.from_values([number(run["test"][name]) for run in runs]) for name in METRICS if measured},
        difference=Estimate.from_values([_auc(reports[seed]) - reference_auc[seed] for seed in common])
        if common
        else None,
        parameters=runs[0]["parameters"],
        step_ms=float(np.median([run["step_ms"] for run in runs])),
        impressions_per_second=float(np.median(rates)) if rates else None,
        flops=runs[0].get("flops"),
        peak_mib=max(run["peak_mib"] for run in runs),
        seconds=sum(run["seconds"] for run in runs),
        curves=[[number(record["valid"]["auc"]) for record in run["history"]] for run in runs],
    )


def _auc(report: Mapping[str, Any]) -> float:
    return number((report["test"] or report["valid"])["auc"])


def number(value: float | None) -> float:
    """A number read from JSON, where null stands for NaN."""
    return math.nan if value is None else value
