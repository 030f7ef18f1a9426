"""Writes what came out of an experiment: `results.json`, `table.md` and the pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interformer.checkpoint import differences
from interformer.experiments.plan import Plan
from interformer.experiments.runs import Job, Machine, jobs_of
from interformer.experiments.summary import number, reports_of, summarize
from interformer.experiments.table import table
from interformer.files import DamagedFileError, read_sealed, to_json, write_text
from interformer.metrics import Metrics

# Of a finished run's identity, what the plan does not say: a report takes it as it was.
NOT_IN_THE_PLAN = ("machine", "versions")


def write(plan: Plan, folder: Path) -> Iterator[str]:
    """Writes everything from the finished runs of the plan's settings; yields what is to be said."""
    jobs, reports = jobs_of(plan, plan.variants, folder, Machine(), clicks=None), {}
    for variant in plan.variants:
        mine = [job for job in jobs if job.name.rpartition("-seed")[0] == variant.name and job.finished()]
        stale = {job.name: found for job in mine if (found := _stale(job))}
        yield from (
            f"left out of the table: {job.result}: {'; '.join(stale[job.name])}" for job in mine if job.name in stale
        )
        reports[variant.name] = reports_of(job for job in mine if job.name not in stale)
    rows = summarize(plan.variants, reports, plan.reference)
    write_text(
        folder / "results.json",
        to_json({"name": plan.name, "reference": plan.reference, "rows": [row.to_dict() for row in rows]}),
    )
    write_text(folder / "table.md", table(plan.name, rows, plan.reference))
    yield f"{folder / 'table.md'}: {len(rows)} of {len(plan.variants)} variants"
    if rows:
        from interformer.experiments.plots import draw  # takes a second to import

        yield f"drawn: {', '.join(path.name for path in draw(rows, plan.reference, folder))}"


def _stale(job: Job) -> list[str]:
    """How a finished run's settings differ from the plan's, or that it cannot be read."""
    try:
        theirs = dict(read_sealed(job.result)["identity"])
    except DamagedFileError as error:
        return [str(error).removeprefix(f"{job.result}: ")]
    ours = dict(job.identity)
    theirs["data"] = {**theirs["data"], "clicks": None}
    for name in NOT_IN_THE_PLAN:
        del theirs[name], ours[name]
    return differences(theirs, ours)


def in_words(job: Job) -> str:
    """What a finished run brought, on a line."""
    report: dict[str, Any] = read_sealed(job.result)["report"]
    parts = [f"valid AUC {number(report['valid']['auc']):.4f}"]
    if report["test"] is not None:
        parts.append(f"test {Metrics(**{name: number(value) for name, value in report['test'].items()})}")
    return f"{'  '.join(parts)}  {report['seconds']:.0f} s"
