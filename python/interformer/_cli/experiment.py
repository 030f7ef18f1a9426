"""Run the grids of models and seeds described by YAML files; write a table and plots of the results.

A finished run is not repeated; a killed run resumes from its last epoch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from interformer.distributed import usable_device
from interformer.experiments import plan as plans
from interformer.experiments import results, search
from interformer.experiments.grid import Grid, Watch, part_sizes
from interformer.experiments.plan import Plan, Variant
from interformer.experiments.runs import Job, Machine, jobs_of
from interformer_kernels._cli.arguments import count


class Bars(Watch):
    """Progress bars of all runs together and of each running one, and a line per finished run, on standard error."""

    def __init__(self, console: Console, total: int) -> None:
        self.lock = Lock()
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.total_task = self.bars.add_task("runs", total=total, now="")
        self.job_tasks: dict[str, TaskID] = {}
        self.last_auc: dict[str, str] = {}

    def started(self, job: Job) -> None:
        with self.lock:
            self.job_tasks[job.name] = self.bars.add_task(job.name, total=job.identity["training"]["epochs"], now="")

    def progressed(self, job: Job, message: Mapping[str, Any]) -> None:
        with self.lock:
            if "valid_auc" in message:
                self.last_auc[job.name] = f"valid AUC {message['valid_auc']:.4f}"
            done, now = message["epoch"] + message["done"], self.last_auc.get(job.name, "")
            self.bars.update(self.job_tasks[job.name], completed=round(done, 2), now=now)

    def ended(self, job: Job, error: str | None) -> None:
        with self.lock:
            self.bars.remove_task(self.job_tasks.pop(job.name))
            self.bars.advance(self.total_task)
            self.say(f"{job.name}: {'FAILED: ' + error if error else results.one_line_result(job)}")

    def say(self, message: str) -> None:
        self.bars.console.print(message, highlight=False, markup=False, soft_wrap=True)


def add_arguments(command: argparse.ArgumentParser) -> None:
    configs = "YAML files, or names of shipped ones"
    command.add_argument("configs", nargs="+", metavar="CONFIG", help=configs)
    command.add_argument(
        "--data", type=Path, default=Path(), metavar="DIR", help="root of the data's paths (default: .)"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="results go to DIR/NAME")
    command.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run only these variants")
    command.add_argument("--seeds", type=_seeds, default=(), metavar="INT,INT,...", help="run only these seeds")
    command.add_argument("--jobs", type=count, default=1, metavar="INT", help="number of parallel runs (default: 1)")
    command.add_argument("--threads", type=count, default=1, metavar="INT", help="threads of each run (default: 1)")
    command.add_argument("--device", default="cpu", help="(default: cpu)")
    command.add_argument("--overwrite", action="store_true", help="repeat runs that were made with other settings")
    task = command.add_mutually_exclusive_group()
    task.add_argument("--report", action="store_true", help="run nothing; write the table and plots of finished runs")
    task.add_argument(
        "--tune",
        action="store_true",
        help="run each variant's search, on the validation part only, with its first seed",
    )


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"wanted whole numbers with commas between, found {text[:40]!r}") from error


def run(options: argparse.Namespace) -> int:
    """Run all plans; the exit status is 1 if a run failed, which does not stop the others."""
    all_plans = [plans.read(plans.find(name)) for name in options.configs]
    known = {variant.name for plan in all_plans for variant in plan.variants}
    for name in options.only:
        if name not in known:
            raise ValueError(f"--only must name variants among {', '.join(sorted(known))}; found {name!r}")
    usable_device(options.device)
    console = Console(stderr=True)
    failed = 0
    for plan in all_plans:
        chosen = plan.choose(tuple(options.only), options.seeds)
        if options.tune:
            failed += tune(plan, chosen, options, console)
        else:
            failed += measure(plan, chosen, options, console)
    return int(failed > 0)


def measure(plan: Plan, chosen: Sequence[Variant], options: argparse.Namespace, console: Console) -> int:
    """Execute the unfinished runs, and report all; returns the number of failed runs."""
    folder, machine = options.out / plan.name, Machine(options.device, options.threads)
    failed: Mapping[str, str] = {}
    if not options.report:
        clicks = part_sizes(plan.data, options.data, measure_test=True)
        failed = execute(jobs_of(plan, chosen, folder, machine, clicks=clicks), options, console)
    for line in results.write(plan, folder):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    sys.stdout.write((folder / "table.md").read_text(encoding="utf-8"))
    return len(failed)


def tune(plan: Plan, chosen: Sequence[Variant], options: argparse.Namespace, console: Console) -> int:
    """Run every point of the search grids, and rank them by validation AUC; returns the number of failed runs."""
    folder, machine = options.out / plan.name / "tune", Machine(options.device, options.threads)
    clicks = part_sizes(plan.data, options.data, measure_test=False)
    tried = search.jobs(plan, chosen, folder, machine, clicks)
    failed = execute([trial.job for trial in tried], options, console)
    sys.stdout.write(search.write(plan, tried, folder))
    return len(failed)


def execute(jobs: Sequence[Job], options: argparse.Namespace, console: Console) -> dict[str, str]:
    """Execute the unfinished jobs; returns the errors of those that failed, by name."""
    conflicts = {job.name: conflict for job in jobs if (conflict := job.conflict())}
    if conflicts and not options.overwrite:
        listed = " | ".join(conflicts.values())
        raise ValueError(f"runs with other settings exist under these names; --overwrite repeats them: {listed}")
    for job in jobs:
        if job.name in conflicts:
            job.forget()
    waiting = [job for job in jobs if not job.finished()]
    bars = Bars(console, len(waiting))
    bars.say(f"{len(jobs) - len(waiting)} runs are finished, {len(waiting)} to go")
    with bars.bars:
        return Grid(options.data, options.jobs, bars).run(waiting)
