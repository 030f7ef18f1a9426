"""Training with early stopping, and resuming after a kill.

All randomness of a run comes from its seed: parameters, dropout, and the batches of epoch `e` from `(seed, e)`. A
checkpoint is written after every epoch, so a run that was killed and resumed passes through the same states as one that
was not. Under `torchrun` (a default process group) processes share every batch; gradients are those of the whole batch.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interformer import checks
from interformer.checkpoint import read_checkpoint, write_atomically
from interformer.config import InterFormerConfig
from interformer.data.clicks import Clicks, Splits
from interformer.distributed import World, usable
from interformer.metrics import Metrics, entropy, evaluate
from interformer.models import build_model


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Args:
        epochs: at most so many.
        patience: stop after so many epochs in a row without a better validation AUC.
        batch_size: impressions of a step; evaluation takes batches of four times as many.
        lr: of Adam, in the first epoch.
        lr_decay: factor of the learning rate from one epoch to the next.
        weight_decay: decoupled, of matrices outside the embedding tables; a step takes `lr * weight_decay` of them.
        embedding_weight_decay: the same, of the embedding tables.
        seed: of everything random.
    """

    epochs: int = 10
    patience: int = 2
    batch_size: int = 256
    lr: float = 1e-3
    lr_decay: float = 1.0
    weight_decay: float = 0.0
    embedding_weight_decay: float = 0.0
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_size"):
            checks.whole(name, getattr(self, name), 1)
        checks.number("lr_decay", self.lr_decay, 0, 1, above=True, below=False)
        for name, above in (("lr", True), ("weight_decay", False), ("embedding_weight_decay", False)):
            value = getattr(self, name)
            checks.kind(name, value, int, float)
            if not (value > 0 if above else value >= 0):
                raise ValueError(f"{name} must be {'above' if above else 'at least'} 0, found {value}")
            if not checks.finite_in_float32(value):
                raise ValueError(f"{name} must be finite in float32, found {checks.shown(value)}")
        checks.seed("seed", self.seed)


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch brought: mean training loss, metrics on the validation part, seconds of training."""

    epoch: int
    loss: float
    valid: dict[str, float]
    seconds: float


@dataclass
class Report:
    """The outcome of a run: the curve, and both held-out parts under the parameters of the best validation AUC.

    Args:
        history: one record an epoch.
        best_epoch: the one of the best validation AUC.
        valid, test: under its parameters; no test where it was not to be measured.
        parameters: numbers in the model's parameters.
        step_ms: median milliseconds of a training step: batch to device, forward, backward, optimiser.
        seconds: of all epochs with their validation, those before a resume included, and of the last measurement.
        peak_mib: peak memory: of the device's allocator on CUDA, else the process' resident set (data included).
        resumed_at: epochs that a checkpoint brought.
    """

    history: list[EpochRecord]
    best_epoch: int
    valid: Metrics
    test: Metrics | None
    parameters: int
    step_ms: float
    seconds: float
    peak_mib: float
    resumed_at: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Progress:
    """What a run tells while it goes on; the default says nothing."""

    def start_epoch(self, epoch: int, impressions: int) -> None: ...

    def step(self, impressions: int, tokens: int, loss: float) -> None: ...

    def end_epoch(self, record: EpochRecord) -> None: ...

    def say(self, message: str) -> None: ...


class Run:
    """A model in training, its optimiser and its curve: all that a checkpoint holds.

    Args:
        splits: the data; only their schema, and the training part's mean label, become part of the run.
        config: settings of the model.
        train_config: the training.
        device: where the model lives.
        model: which of `interformer.models` it is.
        measure_test: whether the test part may be looked at; without, not even its size is.
    """

    FORMAT = 2

    def __init__(
        self,
        splits: Splits,
        config: InterFormerConfig,
        train_config: TrainConfig,
        device: torch.device | str = "cpu",
        *,
        model: str = "interformer",
        measure_test: bool = True,
    ) -> None:
        self.parts = {name: part for name, part in splits.parts().items() if measure_test or name != "test"}
        for name, part in self.parts.items():
            if not len(part):
                raise ValueError(f"splits.{name} must hold at least one impression, found none")
        self.splits, self.config, self.train_config = splits, config, train_config
        self.kind, self.device = model, torch.device(device)
        torch.manual_seed(train_config.seed)
        self.model = build_model(model, config, splits.schema).to(self.device)
        self.world = World.here()
        self.stepped = self.world.wrap(self.model)
        self.optimizer = make_optimizer(self.model, train_config)
        self.train_rate = splits.train.rate()
        entropy(self.train_rate)  # a training part of one class has no NE: better known now than after an epoch
        self.history: list[EpochRecord] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = -1
        self.step_seconds: list[float] = []
        self.seconds = 0.0

    def identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be this run's: everything but the number of epochs and the backend."""
        model, training = self.config.to_dict(), asdict(self.train_config)
        del model["backend"], training["epochs"]
        sizes = {name: len(part) for name, part in self.parts.items()}
        data = {"name": self.splits.name, "schema": self.splits.schema.to_dict(), **sizes}
        return {"format": self.FORMAT, "kind": self.kind, "model": model, "training": training, "data": data}

    def finished(self) -> bool:
        """Whether the last epoch is over, or validation has not improved for `patience` epochs."""
        done, config = len(self.history), self.train_config
        return done >= config.epochs or (done > 0 and done - 1 - self.best_epoch >= config.patience)

    def train_epoch(self, progress: Progress) -> EpochRecord:
        """One pass over the training part, and the validation metrics after it."""
        config, epoch, began = self.train_config, len(self.history), time.perf_counter()
        train = self.splits.train
        progress.start_epoch(epoch, len(train))
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * config.lr_decay**epoch
        self.model.train()
        total, seed = 0.0, config.seed * 1_000_003 + epoch
        if self.world.size > 1:
            torch.manual_seed(seed * self.world.size + self.world.rank)  # dropout of other rows is another one
        for rows in train.batch_rows(config.batch_size, seed=seed):
            batch = train.batch(self.world.share(rows))
            step_began = time.perf_counter()
            batch = batch.to(self.device)
            # The mean over the processes of this is the mean over the batch, however many rows each has.
            summed = F.binary_cross_entropy_with_logits(self.stepped(batch), batch.label, reduction="sum")
            loss = summed / len(rows) * self.world.size
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            now = float(self.world.mean(loss.detach()))  # waits for the device, so that the clock is right
            self.step_seconds.append(time.perf_counter() - step_began)
            total += now * len(rows)
            progress.step(len(rows), batch.sequences.shape[0], now)
        seconds = time.perf_counter() - began
        record = EpochRecord(epoch, total / len(train), self.evaluate(self.splits.valid).to_dict(), seconds)
        self.history.append(record)
        if self.best_epoch < 0 or record.valid["auc"] > self.history[self.best_epoch].valid["auc"]:
            self.best_epoch = epoch
            self.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.seconds += time.perf_counter() - began
        progress.end_epoch(record)
        return record

    def report(self, resumed_at: int) -> Report:
        """Both held-out parts (or the validation part alone) under the parameters of the best epoch."""
        began = time.perf_counter()
        self.model.load_state_dict(self.best)
        valid = self.evaluate(self.splits.valid)
        test = self.evaluate(self.parts["test"]) if "test" in self.parts else None
        return Report(
            history=self.history,
            best_epoch=self.best_epoch,
            valid=valid,
            test=test,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            step_ms=1e3 * statistics.median(self.step_seconds),
            seconds=self.seconds + time.perf_counter() - began,
            peak_mib=peak_bytes(self.device) / 2**20,
            resumed_at=resumed_at,
        )

    def evaluate(self, clicks: Clicks) -> Metrics:
        """Metrics of `clicks` under the present parameters."""
        label, logit, user = predict(self.model, clicks, 4 * self.train_config.batch_size, self.device, self.world)
        if not logit.isfinite().all():
            raise ValueError("Input contains NaN or infinity: the model's logits are not finite; a smaller lr may help")
        return evaluate(label, logit, user, self.train_rate)

    # ------------------------------------------------------------ checkpoints

    def save(self, path: Path) -> None:
        """Write the run to `path`: whole, or not at all."""
        write_atomically(path, self.state())

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds."""
        return {
            "identity": self.identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "history": [asdict(record) for record in self.history],
            "best": self.best,
            "best_epoch": self.best_epoch,
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
        }

    def load(self, path: Path) -> None:
        """Go on where the run in `path` stood; where anything is wrong with it, this run stays as it is.

        Raises:
            OSError: the file cannot be read.
            ValueError: that run had other settings or other data, or the file is damaged or no checkpoint.
        """
        shapes = [parameter.shape for group in self.optimizer.param_groups for parameter in group["params"]]
        state = read_checkpoint(path, self.state(), shapes, self.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.step_seconds, self.seconds = state["step_seconds"], state["seconds"]
        torch.set_rng_state(state["rng"].cpu())
        if state["device_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["device_rng"].cpu(), self.device)


def train(
    splits: Splits,
    config: InterFormerConfig,
    train_config: TrainConfig,
    *,
    model: str = "interformer",
    checkpoint: Path | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    measure_test: bool = True,
) -> Report:
    """Train on `splits.train`, stop on `splits.valid`, and measure `splits.test` once, at the end, at the best epoch.

    `model` is one of `interformer.models`. Without `measure_test` the test part is never touched: for tuning.
    With `checkpoint` the run is written there after every epoch; with `resume` it goes on from there (and starts,
    saying so, where the file does not exist yet). The caller's random state is left as it was.
    """
    if resume and checkpoint is None:
        raise ValueError("train: resume wants a checkpoint to go on from, found None")
    progress = progress or Progress()
    device = usable(device) if isinstance(device, str) else device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        run = Run(splits, config, train_config, device, model=model, measure_test=measure_test)
        if resume and checkpoint is not None:
            if checkpoint.exists():
                run.load(checkpoint)
                progress.say(f"resumed {checkpoint} after epoch {len(run.history)}")
            else:
                progress.say(f"no checkpoint yet at {checkpoint}: starting from the beginning")
        resumed_at = len(run.history)
        while not run.finished():
            run.train_epoch(progress)
            if checkpoint is not None and run.world.rank == 0:
                run.save(checkpoint)
        return run.report(resumed_at)


def peak_bytes(device: torch.device) -> int:
    """Peak of the device's allocator on CUDA, of this process' resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay in three groups: embedding tables, other matrices, vectors (not decayed)."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    in_tables = {id(parameter) for parameter in tables}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in in_tables]
    groups: list[dict[str, Any]] = [
        {"params": tables, "weight_decay": config.embedding_weight_decay},
        {"params": [parameter for parameter in rest if parameter.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in rest if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)  # one pass over a table instead of ten


def predict(
    model: nn.Module, clicks: Clicks, batch_size: int, device: torch.device | str = "cpu", world: World | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(label, logit, user)`, each `[N]` on the CPU, of all clicks, in batches from short histories to long ones.

    The processes of `world` take turns in batches, and each gets the answers of all, one process' after another's.
    """
    world = world or World()
    was_training = model.training
    model.eval()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for rows in world.share(clicks.batch_rows(batch_size)):
            batch = clicks.batch(rows)
            parts.append((batch.label, model(batch.to(device)).float().cpu(), batch.user))
    model.train(was_training)
    label, logit, user = (torch.cat(column) for column in zip(*world.gather(parts), strict=True))
    return label, logit, user
