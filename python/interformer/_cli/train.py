"""Train one model on clicks and report its metrics.

Training stops when validation AUC no longer improves; the test part is measured once, at the end, at the best epoch.
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
from interformer.distributed import World, process_group
from interformer.files import check_writable, to_json, write_text
from interformer.metrics import Metrics
from interformer.models import MODELS, find_model
from interformer.presets import MOVIELENS, SYNTHETIC
from interformer.settings import add_options, read_options

MAX_THREADS = 1024
# Settings of `SyntheticLaw` without options of their own: `--seed` is that of training, so that runs of different seeds
# see the same data, and `--max-history` is the model's.
SKIPPED_DATA_OPTIONS = ("seed", "max_history")


class Bars(training.Progress):
    """A progress bar per epoch with loss and speed, and a line for each finished epoch, on standard error."""

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
        # The loss of a single batch is noisy: the bar shows a running mean over about twenty batches.
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


def _model(name: str) -> str:
    try:
        find_model(name)
    except (ImportError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def add_arguments(command: argparse.ArgumentParser) -> None:
    data_help = "directory of MovieLens in atomic form (default: synthetic clicks)"
    command.add_argument("--data", type=Path, metavar="PATH", help=data_help)
    model_help = f"{', '.join(MODELS)}, or module:Class of your own (default: %(default)s)"
    command.add_argument("--model", type=_model, default="interformer", metavar="NAME", help=model_help)
    command.add_argument("--checkpoint", type=Path, metavar="FILE", help="write the run here after every epoch")
    command.add_argument("--resume", action="store_true", help="resume from --checkpoint")
    command.add_argument("--json", metavar="FILE|-", help="write the report as JSON, - for standard output")
    command.add_argument("--device", default="cpu", help="(default: cpu)")
    # The presets' operations are too small for several threads, and on a busy machine waiting for a second thread makes
    # them ten times slower.
    command.add_argument("--threads", type=int, default=1, metavar="INT", help="threads of PyTorch (default: 1)")
    for title, index in (("model", 0), ("training", 1)):
        add_options(command, title, {"synthetic": SYNTHETIC[index], "--data": MOVIELENS[index]})
    add_options(command, "synthetic data", {"": SyntheticLaw()}, skip=SKIPPED_DATA_OPTIONS)


def load(options: argparse.Namespace, max_history: int) -> Splits:
    """The data chosen by the options, with histories truncated to their last `max_history` events."""
    if options.data is not None:
        return read_movielens(options.data, max_history=max_history)
    law = read_options(options, SyntheticLaw(), skip=SKIPPED_DATA_OPTIONS)
    return synthesize(replace(law, max_history=max_history))


def run(options: argparse.Namespace) -> int:
    checks.whole("threads", options.threads, 1)
    checks.whole("threads", options.threads, 1, MAX_THREADS)
    for target in (options.checkpoint, options.json):
        if target is not None and target != "-":
            check_writable(Path(target))
    torch.set_num_threads(options.threads)
    with process_group(options.device) as device:
        return _run(options, device)


def _run(options: argparse.Namespace, device: torch.device) -> int:
    is_main = World.here().rank == 0
    console = Console(stderr=True, quiet=not is_main)
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
    if options.json is not None and is_main:
        write_json(options.json, describe(splits, options.model, config, train_config, report))
    return 0


def describe(
    splits: Splits, kind: str, config: InterFormerConfig, train_config: training.TrainConfig, report: training.Report
) -> dict[str, Any]:
    """The settings and results of a run as plain numbers and strings."""
    sizes = {name: len(part) for name, part in splits.parts().items()}
    return {
        "data": {"name": splits.name, "clicks": sizes, **splits.facts},
        "kind": kind,
        "model": config.to_dict(),
        "training": asdict(train_config),
        **report.to_dict(),
    }


def write_json(target: str, content: dict[str, Any]) -> None:
    """Write to the file `target`, atomically, or to standard output for `-`."""
    if target == "-":
        sys.stdout.write(to_json(content))
    else:
        write_text(Path(target), to_json(content))
