"""The command line of `make gpu-report`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpu import kit, plan, results, table
from gpu.plan import Plan
from gpu.results import ROOT, Record, Try
from gpu.run import BusyError, Report, Stage, Step, Stopped

OUT = ROOT / "build" / "gpu-report"
RESULTS = ROOT / "bench" / "results"


def arguments() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="make gpu-report", description="see docs/gpu.md: First contact with a GPU")
    add = parser.add_argument
    add("--out", type=Path, default=OUT, metavar="DIR", help=f"where results go: {OUT.relative_to(ROOT)}")
    add("--part", type=int, choices=(1, 2), help="for a machine that is at hand for minutes; both where left out")
    add("--resume", action="store_true", help="go on from the results in DIR: only what is not done well is done")
    add("--only", action="append", metavar="STEP", help="these steps alone, done or not; *, ? stand for others")
    add("--seconds", type=_seconds, metavar="N", help="for all of it; 330 for part 1, 300 for part 2, 590 for both")
    add("--data", type=Path, metavar="DIR", help="directory with the length files")
    add("--table", type=Path, metavar="DIR", help="run nothing: write <gpu>.json and <gpu>.md from the results in DIR")
    add("--into", type=Path, metavar="DIR", default=RESULTS, help=f"where --table writes: {RESULTS.relative_to(ROOT)}")
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"wanted a number above 0, found {text[:40]!r}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the report; 1 where something went wrong, 2 where it cannot begin."""
    chosen = arguments().parse_args(argv)
    try:
        if chosen.table:
            return write(chosen.table, chosen.into)
        if not chosen.resume and _has_results(chosen.out / results.FILE):
            return _refused(f"{chosen.out} holds results: --resume goes on from them, --out DIR begins elsewhere")
        report = Report(chosen.out, chosen.seconds or plan.SECONDS[chosen.part])
        report.environment = plan.environment(os.environ)
        opened = contextlib.ExitStack()
        opened.enter_context(report.opened())
    except (BusyError, OSError) as error:
        return _refused(str(error))
    with opened:
        return carry_out(
            report, Plan(report.file, data=chosen.data and chosen.data.resolve()), chosen.part, chosen.only
        )


def _refused(reason: str) -> int:
    print(f"make gpu-report: {reason}", file=sys.stderr)
    return 2


def _has_results(file: Path) -> bool:
    """Whether there are more results than a report without a GPU leaves."""
    tries = results.tries(results.read(file)[0])
    return any(attempt.records for step, attempt in tries.items() if step not in ("report", "machine"))


def carry_out(report: Report, report_plan: Plan, part: int | None, only: Sequence[str] | None = None) -> int:
    """Run all of a part and print the table, whatever happens in between; `report` is open."""
    status = 0
    header = {
        "tools": dict(report_plan.tools),
        "commit": kit.commit(),
        "part": part,
        "host": os.cpu_count(),
        "when": table.now(),
    }
    report.record({"kind": "report", "step": "report", **header})
    try:
        status = _steps(report, report_plan, part, only)
    except Stopped as stopped:
        status = 128 + stopped.number
        report.show(f"stopped by signal {stopped.number}")
    if status == NOTHING:
        return 1
    records, damaged = results.read(report.file)
    tries = results.tries(records)
    report.show(f"\n{table.printed(tries, damaged)}")
    wrong = any(table.failures(tries, [record for attempt in tries.values() for record in attempt.records], damaged))
    late = any(attempt.status.startswith(results.NOT_STARTED) for attempt in tries.values())
    return status or int(wrong or late)


NOTHING = -1  # status of a report without a GPU


def _steps(report: Report, report_plan: Plan, part: int | None, only: Sequence[str] | None) -> int:
    report.run([report_plan.look()])
    report_plan = dataclasses.replace(report_plan, tries=report.tries())
    if (reason := _hopeless(report_plan)) is not None:
        print(f"make gpu-report: {reason}", file=sys.stderr)
        return NOTHING
    messages, environment = kit.use(report_plan.machine)
    report.record({"kind": "kit", "step": "report", "said": messages})
    for line in messages:
        report.show(line)
    report.environment |= environment
    report.run([report_plan.ask()], again=True)  # the kit or the code may be another one than in an earlier report
    report_plan = dataclasses.replace(report_plan, tries=report.tries())
    if report_plan.build().steps:
        report.run([report_plan.build()])
        report.run([report_plan.ask()], again=True)
        report_plan = dataclasses.replace(report_plan, tries=report.tries())
    stages = report_plan.stages(part)
    if only:
        stages = _chosen(stages, only)
        if not any(stage.steps for stage in stages):
            report.show(f"--only: wanted a step, found {', '.join(only)[:60]}")
            return 2
    report.run(stages, again=bool(only))
    report.run([report_plan.write_down()], again=True)
    return 0


def _hopeless(report_plan: Plan) -> str | None:
    """The reason why no step can run here, or None. A machine that was slow to look at may answer later."""
    attempt = report_plan.tries["machine"]
    if report_plan.machine:
        return None if report_plan.machine.get("gpu") else "needs a GPU that torch can use, found none"
    return (
        f"cannot look at this machine: {(attempt.last or [attempt.status])[-1]}" if "failed" in attempt.status else None
    )


def _chosen(stages: Sequence[Stage], only: Sequence[str]) -> list[Stage]:
    def is_chosen(step: Step) -> bool:
        return any(fnmatch.fnmatchcase(step.name, pattern) for pattern in only)

    return [dataclasses.replace(stage, steps=[*filter(is_chosen, stage.steps)], leave=0.0) for stage in stages]


# ---------------------------------------------------------------- the files


def write(folder: Path, target: Path) -> int:
    """Write <gpu>.json and <gpu>.md from the results in a folder; here, or where the GPU was."""
    all_records, damaged = results.read(folder / results.FILE)
    tries = results.tries(all_records)
    tries.pop("write", None)  # the step that runs this very function
    if not tries:
        return _refused(f"{folder / results.FILE}: wanted results, found none")
    records = [record for attempt in tries.values() for record in attempt.records]
    machine: Record = next(iter(table.of_kind(records, "machine")), {})
    name = re.sub(r"[^a-z0-9]+", "-", str(machine.get("gpu") or "gpu").lower()).strip("-")
    texts = {f"{name}.json": _json(tries, records), f"{name}.md": _markdown(tries, records, damaged)}
    for file, text in texts.items():
        results.files.write_text(target / file, text)
    print("written:", *(target / file for file in texts))
    return 0


def _json(tries: Mapping[str, Try], records: Sequence[Record]) -> str:
    """Steps and records, a line each; of parity the worst of every quantity, and every breach."""
    worst: dict[tuple[str, ...], Record] = {}
    for record in table.of_kind(records, "parity"):
        key = (
            record["backend"],
            record["op"],
            record["dtype"],
            record["quantity"],
            *(() if record["ok"] else (record["case"],)),
        )
        if key not in worst or (record["share"] or 0) > (worst[key]["share"] or 0):
            worst[key] = record
    reported = [*(record for record in records if record["kind"] != "parity"), *worst.values()]
    steps = [
        {"step": attempt.step, "status": attempt.status, "seconds": attempt.seconds, "last": attempt.last}
        for attempt in tries.values()
    ]
    parts = {"steps": steps, "records": reported}
    members = [f'"{name}": [\n{_lines(part)}\n]' for name, part in parts.items()]
    return "{" + ",\n".join(members) + "}\n"


def _lines(records: Sequence[Record]) -> str:
    return ",\n".join(json.dumps(results.files.finite(record), allow_nan=False) for record in records)


def _markdown(tries: Mapping[str, Try], records: Sequence[Record], damaged: int) -> str:
    """The short table's parts, and the bench's own tables."""
    sys.path[:0] = plan.environment(os.environ)["PYTHONPATH"].split(os.pathsep)
    bench = importlib.import_module("interformer_bench.gpu_tables").tables(records)
    wrong = [f"- {line}" for line in table.failures(tries, records, damaged)]
    lines = ["# First contact", "", table.header(records), "", "## What failed", "", *(wrong or ["Nothing."]), ""]
    missing = [f"- {line}" for line in table.not_done(tries)]
    lines += ["## What was not done", "", *missing, ""] if missing else []
    lines += ["## Parity", "", "Compared, breaches, and the largest share of the budget.", ""]
    lines += [*(f"- {line}" for line in table.parity(records)), "", bench, "## First calls, compiling included", ""]
    lines += [*(f"- {line}" for line in table.first_calls(records)), "", "## Steps", ""]
    lines += ["| step | status | seconds |", "| --- | --- | --- |"]
    lines += [
        f"| {attempt.step} | {attempt.status} | {attempt.seconds:.0f} |"
        for attempt in tries.values()
        if attempt.step != "report"
    ]
    return "\n".join(lines) + "\n"
