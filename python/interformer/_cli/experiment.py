"""Run the grids of models and seeds that YAML files ask for; write a table and plots of what came out.

A run that is finished is not repeated, one that was killed goes on from its last epoch.
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

from interformer.distributed import usable
from interformer.experiments import plan as plans
from interformer.experiments import results, search
from interformer.experiments.grid import Grid, Watch, sizes_of
from interformer.experiments.plan import Plan, Variant
from interformer.experiments.runs import Job, Machine, jobs_of
from interformer_kernels._cli.arguments import count


class Bars(Watch):
    """A bar over all runs and one for each that goes on, and a line for each that is over, on standard error."""

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
        self.all = self.bars.add_task("runs", total=total, now="")
        self.of_job: dict[str, TaskID] = {}
        self.last_auc: dict[str, str] = {}

    def started(self, job: Job) -> None:
        with self.lock:
            self.of_job[job.name] = self.bars.add_task(job.name, total=job.identity["training"]["epochs"], now="")

    def told(self, job: Job, message: Mapping[str, Any]) -> None:
        with self.lock:
            if "valid_auc" in message:
                self.last_auc[job.name] = f"valid AUC {message['valid_auc']:.4f}"
            done, now = message["epoch"] + message["done"], self.last_auc.get(job.name, "")
            self.bars.update(self.of_job[job.name], completed=round(done, 2), now=now)

    def ended(self, job: Job, error: str | None) -> None:
        with self.lock:
            self.bars.remove_task(self.of_job.pop(job.name))
            self.bars.advance(self.all)
            self.say(f"{job.name}: {'FAILED: ' + error if error else results.in_words(job)}")

    def say(self, message: str) -> None:
        self.bars.console.print(message, highlight=False, markup=False, soft_wrap=True)


def add_arguments(command: argparse.ArgumentParser) -> None:
    configs = "YAML files, or names of those that come with the package"
    command.add_argument("configs", nargs="+", metavar="CONFIG", help=configs)
    command.add_argument(
        "--data", type=Path, default=Path(), metavar="DIR", help="where the data's paths start (default: .)"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="results go to DIR/NAME")
    command.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these variants alone")
    command.add_argument(
        "--seeds", type=_seeds, default=(), metavar="INT,INT,...", help="of each variant's seeds these alone"
    )
    command.add_argument("--jobs", type=count, default=1, metavar="INT", help="runs at once (default: 1)")
    command.add_argument("--threads", type=count, default=1, metavar="INT", help="threads of each run (default: 1)")
    command.add_argument("--device", default="cpu", help="(default: cpu)")
    command.add_argument("--overwrite", action="store_true", help="runs of another identity are run anew")
    task = command.add_mutually_exclusive_group()
    task.add_argument("--report", action="store_true", help="run nothing: the table and the plots of what is finished")
    task.add_argument(
        "--tune", action="store_true", help="each variant's search, on validation alone, under its first seed"
    )


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"wanted whole numbers with commas between, found {text[:40]!r}") from error


def run(options: argparse.Namespace) -> int:
    """Exit status 1 where a run failed: the others go on."""
    found = [plans.read(plans.find(name)) for name in options.configs]
    known = {variant.name for plan in found for variant in plan.variants}
    for name in options.only:
        if name not in known:
            raise ValueError(f"--only must name variants among {', '.join(sorted(known))}; found {name!r}")
    usable(options.device)
    console = Console(stderr=True)
    failed = 0
    for plan in found:
        chosen = plan.choose(tuple(options.only), options.seeds)
        if options.tune:
            failed += tune(plan, chosen, options, console)
        else:
            failed += measure(plan, chosen, options, console)
    return int(failed > 0)


def measure(plan: Plan, chosen: Sequence[Variant], options: argparse.Namespace, console: Console) -> int:
    """Runs what is not finished, and reports; returns how many failed."""
    folder, machine = options.out / plan.name, Machine(options.device, options.threads)
    failed: Mapping[str, str] = {}
    if not options.report:
        clicks = sizes_of(plan.data, options.data, measure_test=True)
        failed = execute(jobs_of(plan, chosen, folder, machine, clicks=clicks), options, console)
    for line in results.write(plan, folder):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    sys.stdout.write((folder / "table.md").read_text(encoding="utf-8"))
    return len(failed)


def tune(plan: Plan, chosen: Sequence[Variant], options: argparse.Namespace, console: Console) -> int:
    """Tries every point of the grids, and ranks them by validation AUC; returns how many failed."""
    folder, machine = options.out / plan.name / "tune", Machine(options.device, options.threads)
    clicks = sizes_of(plan.data, options.data, measure_test=False)
    tried = search.jobs(plan, chosen, folder, machine, clicks)
    failed = execute([trial.job for trial in tried], options, console)
    sys.stdout.write(search.write(plan, tried, folder))
    return len(failed)


def execute(jobs: Sequence[Job], options: argparse.Namespace, console: Console) -> dict[str, str]:
    """Runs those jobs that are not finished; those that failed come back with their errors."""
    conflicts = {job.name: conflict for job in jobs if (conflict := job.conflict())}
    if conflicts and not options.overwrite:
        told = " | ".join(conflicts.values())
        raise ValueError(f"runs of another identity are in the way; --overwrite runs them anew: {told}")
    for job in jobs:
        if job.name in conflicts:
            job.forget()
    waiting = [job for job in jobs if not job.finished()]
    bars = Bars(console, len(waiting))
    bars.say(f"{len(jobs) - len(waiting)} runs are finished, {len(waiting)} to go")
    with bars.bars:
        return Grid(options.data, options.jobs, bars).run(waiting)
