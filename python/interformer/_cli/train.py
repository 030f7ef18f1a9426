"""Train one model on clicks and say how good it became.

Stops when validation AUC does; the test part is measured once, at the end, at the best epoch.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from interformer import checks
from interformer import train as training
from interformer.config import InterFormerConfig
from interformer.data import Splits, SyntheticLaw, read_movielens, synthesize
from interformer.distributed import World, joined
from interformer.files import to_json, want_writable, write_text
from interformer.metrics import Metrics
from interformer.models import MODELS
from interformer.presets import MOVIELENS, SYNTHETIC
from interformer.settings import add_options, read_options

MOST_THREADS = 1024  # of PyTorch
# Settings of the law that are options of the model and the training: runs of different seeds see the same data.
NOT_OF_THE_DATA = ("seed", "max_history")


class Bars(training.Progress):
    """A bar an epoch with loss and speed, and a line for each epoch that is over, on standard error."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("epoch {task.fields[epoch]:>2}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = TaskID(-1)
        self.tokens = 0
        self.loss = float("nan")

    def start_epoch(self, epoch: int, impressions: int) -> None:
        self.tokens, self.loss = 0, float("nan")
        self.task = self.bars.add_task("", total=impressions, epoch=epoch + 1, loss=self.loss, speed="")

    def step(self, impressions: int, tokens: int, loss: float) -> None:
        self.tokens += tokens
        # A single batch's loss jumps about: the bar shows its running mean over some twenty batches.
        self.loss = loss if self.loss != self.loss else 0.95 * self.loss + 0.05 * loss
        self.bars.update(self.task, advance=impressions, loss=self.loss, speed=self._speed())

    def _speed(self) -> str:
        if self.bars.disable:
            return ""
        task = self.bars.tasks[self.bars.task_ids.index(self.task)]
        if not task.elapsed:
            return ""
        return f"{task.completed / task.elapsed:,.0f} clicks/s, {self.tokens / task.elapsed:,.0f} events/s"

    def end_epoch(self, record: training.EpochRecord) -> None:
        self.bars.remove_task(self.task)
        speed = f"{record.seconds:.1f} s, {self.tokens / record.seconds:,.0f} events/s"
        self.say(f"epoch {record.epoch + 1:>2}  loss {record.loss:.4f}  valid {Metrics(**record.valid)}  {speed}")

    def say(self, message: str) -> None:
        self.bars.console.print(message, highlight=False, soft_wrap=True)


def add_arguments(command: argparse.ArgumentParser) -> None:
    data_help = "directory of MovieLens in atomic form (default: synthetic clicks)"
    command.add_argument("--data", type=Path, metavar="PATH", help=data_help)
    command.add_argument("--model", choices=MODELS, default="interformer", help="(default: %(default)s)")
    command.add_argument("--checkpoint", type=Path, metavar="FILE", help="write the run here after every epoch")
    command.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    command.add_argument("--json", metavar="FILE|-", help="write the report as JSON, - for standard output")
    command.add_argument("--device", default="cpu", help="(default: cpu)")
    # The presets' operations are too small to share, and on a busy machine waiting for a second thread costs tenfold.
    command.add_argument("--threads", type=int, default=1, metavar="INT", help="threads of PyTorch (default: 1)")
    for title, index in (("model", 0), ("training", 1)):
        add_options(command, title, {"synthetic": SYNTHETIC[index], "--data": MOVIELENS[index]})
    add_options(command, "synthetic data", {"": SyntheticLaw()}, skip=NOT_OF_THE_DATA)


def load(options: argparse.Namespace, max_history: int) -> Splits:
    """The data that the options name, histories cut to their last `max_history` events."""
    if options.data is not None:
        return read_movielens(options.data, max_history=max_history)
    law = read_options(options, SyntheticLaw(), skip=NOT_OF_THE_DATA)
    return synthesize(replace(law, max_history=max_history))


def run(options: argparse.Namespace) -> int:
    checks.whole("threads", options.threads, 1)
    checks.whole("threads", options.threads, 1, MOST_THREADS)
    for target in (options.checkpoint, options.json):
        if target is not None and target != "-":
            want_writable(Path(target))
    torch.set_num_threads(options.threads)
    with joined(options.device) as device:
        return _run(options, device)


def _run(options: argparse.Namespace, device: torch.device) -> int:
    first = World.here().rank == 0
    console = Console(stderr=True, quiet=not first)
    preset = SYNTHETIC if options.data is None else MOVIELENS
    config, train_config = read_options(options, preset.model), read_options(options, preset.training)
    splits = load(options, config.max_history)
    progress = Bars(console)
    for name, part in splits.parts().items():
        mean = float(part.lengths.double().mean())
        progress.say(f"{splits.name} {name}: {len(part):,} clicks, rate {part.rate():.3f}, mean history {mean:.1f}")
    with progress.bars:
        report = training.train(
            splits,
            config,
            train_config,
            model=options.model,
            checkpoint=options.checkpoint,
            resume=options.resume,
            device=device,
            progress=progress,
        )
    for name, value in splits.facts.items():
        progress.say(f"{name} {value:.4f}")
    cost = f"{report.step_ms:.1f} ms a step, {report.seconds:.1f} s, {report.peak_mib:.0f} MiB"
    best = f"best epoch {report.best_epoch + 1} of {len(report.history)}"
    progress.say(f"{best}, {report.parameters:,} parameters, {cost}")
    progress.say(f"valid {report.valid}")
    progress.say(f"test  {report.test}")
    if options.json is not None and first:
        write_json(options.json, describe(splits, options.model, config, train_config, report))
    return 0


def describe(
    splits: Splits, kind: str, config: InterFormerConfig, train_config: training.TrainConfig, report: training.Report
) -> dict[str, Any]:
    """The whole run in plain numbers and strings."""
    sizes = {name: len(part) for name, part in splits.parts().items()}
    return {
        "data": {"name": splits.name, "clicks": sizes, **splits.facts},
        "kind": kind,
        "model": config.to_dict(),
        "training": asdict(train_config),
        **report.to_dict(),
    }


def write_json(target: str, content: dict[str, Any]) -> None:
    """Write to the file `target`, whole or not at all, or to standard output for `-`."""
    if target == "-":
        sys.stdout.write(to_json(content))
    else:
        write_text(Path(target), to_json(content))
