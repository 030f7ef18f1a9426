"""Gradient-boosted trees: the floor that models with histories must pass, where candidates have counts as fields."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits

from interformer.data.clicks import Clicks, Splits
from interformer.metrics import Metrics, evaluate, logloss
from interformer.train import EpochRecord, Progress, Report, TrainConfig, peak_bytes

TREES = 10  # of an epoch
LEAVES = 31


def boost(
    splits: Splits, train_config: TrainConfig, *, progress: Progress | None = None, measure_test: bool = True
) -> Report:
    """Train scikit-learn's `HistGradientBoostingClassifier` on `splits.train`, and stop on `splits.valid`.

    Features are the dense scalars and all ids as numbers, which is what trees need of buckets and counts; histories are
    not read. An epoch is ten trees of 31 leaves. Of `train_config` it reads `epochs`, `patience`, `lr`,
    `weight_decay` (the L2 regularisation of leaves) and `seed`. Test metrics are those of the best epoch's trees. It
    runs on the CPU, on PyTorch's number of threads, and keeps no checkpoint.
    """
    progress = progress or Progress()
    run = _Run(splits, train_config)
    with threadpool_limits(torch.get_num_threads()):
        while not run.finished():
            progress.start_epoch(len(run.history), len(splits.train))
            progress.end_epoch(run.train_epoch())
        return run.report(measure_test)


@dataclass(frozen=True)
class _Part:
    features: NDArray[np.float32]
    label: NDArray[np.float32]
    user: NDArray[Any]

    @classmethod
    def of(cls, clicks: Clicks) -> _Part:
        features = torch.cat((clicks.dense.float(), clicks.categorical.float()), 1).numpy()
        return cls(features, clicks.label.numpy(), clicks.user.numpy())


class _Run:
    """Trees so far, and their learning curve."""

    def __init__(self, splits: Splits, config: TrainConfig) -> None:
        self.splits, self.config = splits, config
        self.train, self.valid = _Part.of(splits.train), _Part.of(splits.valid)
        self.trees = HistGradientBoostingClassifier(
            learning_rate=config.lr, l2_regularization=config.weight_decay, max_leaf_nodes=LEAVES, max_iter=TREES,
            early_stopping=False, warm_start=True, random_state=config.seed,
        )  # fmt: skip
        self.history: list[EpochRecord] = []
        self.best_epoch, self.seconds = -1, 0.0

    def finished(self) -> bool:
        return self.config.ends(len(self.history), self.best_epoch)

    def train_epoch(self) -> EpochRecord:
        """Ten more trees, and the validation metrics after them."""
        began, epoch = time.perf_counter(), len(self.history)
        self.trees.set_params(max_iter=TREES * (epoch + 1)).fit(self.train.features, self.train.label)
        seconds = time.perf_counter() - began
        loss = logloss(self.train.label, self._logits(self.train, epoch))
        record = EpochRecord(epoch, loss, self._metrics(self.valid, epoch).to_dict(), seconds)
        self.history.append(record)
        if self.best_epoch < 0 or record.valid["auc"] > self.history[self.best_epoch].valid["auc"]:
            self.best_epoch = epoch
        self.seconds += time.perf_counter() - began
        return record

    def report(self, measure_test: bool) -> Report:
        began = time.perf_counter()
        valid = self._metrics(self.valid, self.best_epoch)
        valid_seconds = time.perf_counter() - began
        test = self._metrics(_Part.of(self.splits.test), self.best_epoch) if measure_test else None
        return Report(
            history=self.history,
            best_epoch=self.best_epoch,
            valid=valid,
            test=test,
            parameters=TREES * LEAVES * (self.best_epoch + 1),
            step_ms=1e3 * sum(record.seconds for record in self.history) / (TREES * len(self.history)),
            impressions_per_second=len(self.splits.valid) / valid_seconds,
            flops=None,
            seconds=self.seconds + time.perf_counter() - began,
            peak_mib=peak_bytes(torch.device("cpu")) / 2**20,
            resumed_at=0,
        )

    def _metrics(self, part: _Part, epoch: int) -> Metrics:
        return evaluate(part.label, self._logits(part, epoch), part.user, self.splits.train.rate())

    def _logits(self, part: _Part, epoch: int) -> NDArray[np.float64]:
        """Logits by the trees up to those of `epoch`."""
        stages = self.trees.staged_decision_function(part.features)
        return np.ravel(next(islice(stages, TREES * (epoch + 1) - 1, None)))
