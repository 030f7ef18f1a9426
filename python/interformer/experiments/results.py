"""Write the results of an experiment: `results.json`, `table.md` and the plots."""

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

# Entries of a finished run's identity that the plan does not determine; a report accepts any value of theirs.
NOT_IN_THE_PLAN = ("machine", "versions")


def write(plan: Plan, folder: Path) -> Iterator[str]:
    """Write the results of finished runs with the plan's settings; yields messages for the user."""
    jobs, reports = jobs_of(plan, plan.variants, folder, Machine(), clicks=None), {}
    for variant in plan.variants:
        finished = [job for job in jobs if job.name.rpartition("-seed")[0] == variant.name and job.finished()]
        stale = {job.name: reasons for job in finished if (reasons := _stale_reasons(job))}
        for job in finished:
            if job.name in stale:
                yield f"left out of the table: {job.result}: {'; '.join(stale[job.name])}"
        reports[variant.name] = reports_of(job for job in finished if job.name not in stale)
    rows = summarize(plan.variants, reports, plan.reference)
    write_text(
        folder / "results.json",
        to_json({"name": plan.name, "reference": plan.reference, "rows": [row.to_dict() for row in rows]}),
    )
    write_text(folder / "table.md", table(plan.name, rows, plan.reference))
    yield f"{folder / 'table.md'}: {len(rows)} of {len(plan.variants)} variants"
    if rows:
        from interformer.experiments.plots import draw  # Importing matplotlib takes a second.

        yield f"drawn: {', '.join(path.name for path in draw(rows, plan.reference, folder))}"


def _stale_reasons(job: Job) -> list[str]:
    """The differences of a finished run's settings from the plan's, or the error of reading it; empty if none."""
    try:
        stored = dict(read_sealed(job.result)["identity"])
    except DamagedFileError as error:
        return [str(error).removeprefix(f"{job.result}: ")]
    current = dict(job.identity)
    stored["data"] = {**stored["data"], "clicks": None}
    for name in NOT_IN_THE_PLAN:
        del stored[name], current[name]
    return differences(stored, current)


def one_line_result(job: Job) -> str:
    """The result of a finished run on one line."""
    report: dict[str, Any] = read_sealed(job.result)["report"]
    parts = [f"valid AUC {number(report['valid']['auc']):.4f}"]
    if report["test"] is not None:
        parts.append(f"test {Metrics(**{name: number(value) for name, value in report['test'].items()})}")
    return f"{'  '.join(parts)}  {report['seconds']:.0f} s"
