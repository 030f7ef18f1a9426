"""The work of a run's own process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from interformer import checks
from interformer.boosting import boost
from interformer.config import InterFormerConfig
from interformer.data import registry
from interformer.data.clicks import Splits
from interformer.experiments.plan import BOOSTING
from interformer.experiments.runs import Job
from interformer.train import EpochRecord, Progress, TrainConfig, train
from interformer_kernels import keep_freed_memory
from interformer_kernels._cli.errors import one_line_error

Send = Callable[[dict[str, Any]], None]


class ForbiddenTest:
    """Placeholder for a test part that a run must not read: any use of it is an error."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test part must not be read, but its attribute {name} was")

    def __len__(self) -> int:
        raise AssertionError("the test part must not be read, but its length was")


class ProgressSender(Progress):
    """Sends every epoch's result, and the progress twice a second."""

    def __init__(self, send: Send, epochs: int) -> None:
        self.send, self.epochs = send, epochs
        self.epoch, self.impressions, self.done, self.last_sent = 0, 1, 0, 0.0

    def start_epoch(self, epoch: int, impressions: int) -> None:
        self.epoch, self.impressions, self.done = epoch, impressions, 0

    def step(self, impressions: int, tokens: int, loss: float) -> None:
        self.done += impressions
        now = time.monotonic()
        if now - self.last_sent > 0.5:
            self.last_sent = now
            self.send({"epoch": self.epoch, "epochs": self.epochs, "done": self.done / self.impressions})

    def end_epoch(self, record: EpochRecord) -> None:
        self.send({"epoch": record.epoch, "epochs": self.epochs, "done": 1.0, "valid_auc": record.valid["auc"]})


def read_data(data: Mapping[str, Any], root: Path) -> Splits:
    """The data named by a plan's `data`; its `path` and a reader's `cache` are relative to `root`."""
    options = {name: value for name, value in data.items() if name not in ("reader", "clicks")}
    for name in ("path", "cache"):
        if name in options:
            checks.kind(f"data.{name}", options[name], str)
            options[name] = root / options[name]
    return registry.read(data["reader"], options.pop("path", None), **options)


def truncate(splits: Splits, max_history: int, measure_test: bool) -> Splits:
    """`splits` with the last `max_history` events of every history, and without test part unless it is measured."""
    test: Any = splits.test.latest(max_history) if measure_test else ForbiddenTest()
    return replace(splits, train=splits.train.latest(max_history), valid=splits.valid.latest(max_history), test=test)


def run(job: Job, root: Path, send: Send) -> None:
    """Train `job`, from its checkpoint if there is one, and write its report."""
    identity = job.identity
    torch.set_num_threads(identity["machine"]["threads"])
    config, train_config = InterFormerConfig.from_dict(identity["model"]), TrainConfig(**identity["training"])
    measure_test = identity["measure_test"]
    splits = truncate(read_data(identity["data"], root), config.max_history, measure_test)
    options: dict[str, Any] = {
        "progress": ProgressSender(send, train_config.epochs),
        "measure_test": measure_test,
    }
    if identity["kind"] == BOOSTING:
        report = boost(splits, train_config, **options)
    else:
        options.update(checkpoint=job.unfinished("pt"), resume=True, device=identity["machine"]["device"])
        report = train(splits, config, train_config, model=identity["kind"], **options)
    job.finish(report.to_dict(), splits.facts)


def describe(data: Mapping[str, Any], root: Path, measure_test: bool) -> dict[str, int]:
    """Number of clicks in each part; the test part is left out unless it is measured."""
    parts = read_data(data, root).parts()
    return {name: len(part) for name, part in parts.items() if measure_test or name != "test"}


def work(job: Job, root: Path, connection: Connection) -> None:
    """Run a job in this process: its progress goes to `connection`, its output to its log."""
    keep_freed_memory()
    with job.lock():
        if job.finished():  # Another process held the lock and finished it.
            job.forget_unfinished()
            return
        job.write()
        with open(job.unfinished("log"), "w", encoding="utf-8") as log:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(log.fileno(), stream.fileno())
        run(job, root, connection.send)  # If the parent is gone, the pipe is broken and this process ends too.


def send_sizes(data: Mapping[str, Any], root: Path, measure_test: bool, connection: Connection) -> None:
    """Send the sizes of the data, or the error of reading it, from this process."""
    try:
        connection.send({"clicks": describe(data, root, measure_test)})
    except Exception as error:
        line = one_line_error(error)
        if line is None:
            raise
        connection.send({"error": line})
