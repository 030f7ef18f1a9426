"""Training with early stopping, and resuming after a kill.

All randomness of a run follows from its seed: parameters, dropout, and the batches of epoch `e` from `(seed, e)`. A
checkpoint is written after every epoch, and a killed and resumed run passes through the same states as an uninterrupted
one. Under `torchrun` (a default process group) processes share every batch; gradients are those of the whole batch.
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
from interformer.checkpoint import read_checkpoint, write_checkpoint
from interformer.config import InterFormerConfig
from interformer.costs import flops_per_candidate
from interformer.data.clicks import Clicks, Splits
from interformer.distributed import World, usable_device
from interformer.metrics import Metrics, entropy, evaluate
from interformer.models import build_model

COUNTED_CANDIDATES = 1, 100


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Args:
        epochs: maximal number of epochs.
        patience: number of epochs in a row without a better validation AUC after which training stops.
        batch_size: impressions per step; evaluation uses batches four times as large.
        lr: Adam's learning rate in the first epoch.
        lr_decay: factor of the learning rate from one epoch to the next.
        weight_decay: decoupled weight decay of matrices other than embedding tables; a step subtracts
            `lr * weight_decay` times the matrix.
        embedding_weight_decay: the same for the embedding tables.
        seed: seed of all random numbers.
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
                raise ValueError(f"{name} must be finite in float32, found {checks.short_repr(value)}")
        checks.seed("seed", self.seed)

    def ends(self, done: int, best_epoch: int) -> bool:
        """Whether training is over after so many epochs, of which that one was the best (from 0; -1 before any)."""
        return done >= self.epochs or (done > 0 and done - 1 - best_epoch >= self.patience)


@dataclass(frozen=True)
class EpochRecord:
    """The results of one epoch: mean training loss, metrics on the validation part, seconds of training."""

    epoch: int
    loss: float
    valid: dict[str, float]
    seconds: float


@dataclass
class Report:
    """The outcome of a run: the learning curve, and metrics of both held-out parts at the best epoch.

    Args:
        history: one record per epoch.
        best_epoch: the epoch of the best validation AUC.
        valid, test: metrics under its parameters; `test` is None if the test part was not measured.
        parameters: number of the model's parameters.
        step_ms: median milliseconds of a training step: batch to device, forward, backward, optimiser.
        impressions_per_second: of the final evaluation of the validation part, batches made.
        flops: FLOPs of a candidate's logit, for requests of 1 and of 100 candidates; None if they are not counted.
        seconds: duration of all epochs with their validation, those before a resume included, and of the final
            evaluation.
        peak_mib: peak memory: of the device's allocator on CUDA, else of the process' resident set (data included).
        resumed_at: number of epochs restored from a checkpoint.
    """

    history: list[EpochRecord]
    best_epoch: int
    valid: Metrics
    test: Metrics | None
    parameters: int
    step_ms: float
    impressions_per_second: float
    flops: dict[int, float] | None
    seconds: float
    peak_mib: float
    resumed_at: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Progress:
    """Callbacks of a running training; the default does nothing."""

    def start_epoch(self, epoch: int, impressions: int) -> None: ...

    def step(self, impressions: int, tokens: int, loss: float) -> None: ...

    def end_epoch(self, record: EpochRecord) -> None: ...

    def say(self, message: str) -> None: ...


class Run:
    """A model in training, its optimiser and its learning curve: all that a checkpoint holds.

    Args:
        splits: the data.
        config: settings of the model.
        train_config: settings of the training.
        device: device of the model.
        model: its name in `interformer.models`.
        measure_test: whether the test part may be read; otherwise not even its size is.
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
        entropy(self.train_rate)  # It raises for a training part of one class, which has no NE, before any epoch runs.
        self.history: list[EpochRecord] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = -1
        self.step_seconds: list[float] = []
        self.seconds = 0.0

    def identity(self) -> dict[str, Any]:
        """The settings that a checkpoint must share with this run: all but the number of epochs and the backend."""
        model, training = self.config.to_dict(), asdict(self.train_config)
        del model["backend"], training["epochs"]
        sizes = {name: len(part) for name, part in self.parts.items()}
        data = {"name": self.splits.name, "schema": self.splits.schema.to_dict(), **sizes}
        return {"format": self.FORMAT, "kind": self.kind, "model": model, "training": training, "data": data}

    def finished(self) -> bool:
        """Whether the last epoch is over, or validation has not improved for `patience` epochs."""
        return self.train_config.ends(len(self.history), self.best_epoch)

    def train_epoch(self, progress: Progress) -> EpochRecord:
        """One pass over the training part, and the validation metrics after it."""
        config, epoch, began = self.train_config, len(self.history), time.perf_counter()
        train = self.splits.train
        progress.start_epoch(epoch, len(train))
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * config.lr_decay**epoch
        self.model.train()
        loss_sum, seed = 0.0, config.seed * 1_000_003 + epoch
        if self.world.size > 1:
            torch.manual_seed(seed * self.world.size + self.world.rank)  # Dropout differs between the processes.
        for rows in train.batch_rows(config.batch_size, seed=seed):
            batch = train.batch(train.split(rows, self.world.size)[self.world.rank])
            step_began = time.perf_counter()
            batch = batch.to(self.device)
            # Its mean over the processes is the mean over the batch, for any distribution of rows.
            summed = F.binary_cross_entropy_with_logits(self.stepped(batch), batch.label, reduction="sum")
            loss = summed / len(rows) * self.world.size
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            mean_loss = float(self.world.mean(loss.detach()))  # `float` synchronises, so that the step time is right.
            self.step_seconds.append(time.perf_counter() - step_began)
            loss_sum += mean_loss * len(rows)
            progress.step(len(rows), batch.sequences.shape[0], mean_loss)
        seconds = time.perf_counter() - began
        record = EpochRecord(epoch, loss_sum / len(train), self.evaluate(self.splits.valid).to_dict(), seconds)
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
        valid_seconds = time.perf_counter() - began
        test = self.evaluate(self.parts["test"]) if "test" in self.parts else None
        return Report(
            history=self.history,
            best_epoch=self.best_epoch,
            valid=valid,
            test=test,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            step_ms=1e3 * statistics.median(self.step_seconds),
            impressions_per_second=len(self.splits.valid) / valid_seconds,
            flops={n: flops_per_candidate(self.model, self.splits.valid, n, self.device) for n in COUNTED_CANDIDATES},
            seconds=self.seconds + time.perf_counter() - began,
            peak_mib=peak_bytes(self.device) / 2**20,
            resumed_at=resumed_at,
        )

    def evaluate(self, clicks: Clicks) -> Metrics:
        """Metrics of `clicks` under the current parameters."""
        label, logit, user = predict(self.model, clicks, 4 * self.train_config.batch_size, self.device, self.world)
        if not logit.isfinite().all():
            raise ValueError("Input contains NaN or infinity: the model's logits are not finite; a smaller lr may help")
        return evaluate(label, logit, user, self.train_rate)

    # ------------------------------------------------------------ checkpoints

    def save(self, path: Path) -> None:
        """Write the run to `path`, atomically."""
        write_checkpoint(path, self.state())

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint."""
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
        """Restore the run in `path`; if an exception is raised, this run is unchanged.

        Raises:
            OSError: the file cannot be read.
            ValueError: that run had other settings or data, or the file is damaged or not a checkpoint.
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

    `model` is one of `interformer.models`. Without `measure_test`, for tuning, the test part is never read. With
    `checkpoint` the run is written there after every epoch; `resume` continues from that file, or starts from the
    beginning, with a message, if it does not exist. The caller's random state is not changed.
    """
    if resume and checkpoint is None:
        raise ValueError("train: resume needs a checkpoint to resume from, found None")
    progress = progress or Progress()
    device = usable_device(device) if isinstance(device, str) else device
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
    """Peak memory of the device's allocator on CUDA, of this process' resident set elsewhere."""
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
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)  # `fused` needs one pass over a table instead of ten.


def predict(
    model: nn.Module, clicks: Clicks, batch_size: int, device: torch.device | str = "cpu", world: World | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(label, logit, user)`, each `[N]` on the CPU, of all clicks, in batches from short histories to long ones.

    The batches are divided among the processes of `world`, and each process gets all results, ordered by process.
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
