"""Two processes train like one: equal losses and gradients, under DDP, FSDP2 and torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from interformer import InterFormer, InterFormerConfig
from interformer.data import SyntheticLaw, synthesize
from interformer.testing import random_batch, rows_of, small_schema
from interformer.train import Progress, Run, TrainConfig, train
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import binary_cross_entropy_with_logits
from two_processes import WORLD, run_together

LAW = SyntheticLaw(num_users=40, impressions_per_user=6, mean_length=8, max_history=12)
MODEL = InterFormerConfig(
    embed_dim=8,
    num_heads=2,
    num_layers=1,
    cross_rank=4,
    interaction_hidden=(8,),
    pffn_hidden=(8,),
    head_hidden=(8,),
    embedding_std=0.5,
    max_history=12,
)
# 192 training impressions in batches of 50: the last batch is smaller, and an odd number is divided unevenly.
TRAINING = TrainConfig(epochs=2, batch_size=49, lr=5e-3, weight_decay=0.1, embedding_weight_decay=0.1)
LENGTHS = (3, 0, 12, 1, 7, 5, 2)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The result of each of `WORKS` in each process."""
    return run_together(WORKS, tmp_path_factory.mktemp("together"))


def _curve() -> list[list[float]]:
    report = train(synthesize(LAW), MODEL, TRAINING)
    return [[record.loss, record.valid["auc"], record.valid["logloss"]] for record in report.history]


def test_data_parallel_training_has_the_curve_of_one_process(together: list[dict[str, Any]]) -> None:
    first, second = (result["_curve"] for result in together)
    assert first == second
    torch.testing.assert_close(torch.tensor(first), torch.tensor(_curve()), rtol=1e-4, atol=1e-5)


def _logits_of_equal_rows() -> list[float]:
    """The logits of this process' rows in a step; all rows are equal, so that only dropout makes them differ."""
    splits = synthesize(LAW)
    first_click = splits.train.select(torch.zeros(4, dtype=torch.int64))
    splits = replace(splits, train=replace(first_click, label=torch.tensor([0.0, 1.0, 0.0, 1.0])))
    run = Run(splits, replace(MODEL, dropout=0.5), replace(TRAINING, batch_size=4))
    logits_seen: list[float] = []
    run.stepped.register_forward_hook(lambda module, inputs, logits: logits_seen.extend(logits.tolist()))
    run.train_epoch(Progress())
    return logits_seen


def test_every_process_drops_what_it_likes(together: list[dict[str, Any]]) -> None:
    first, second = (result["_logits_of_equal_rows"] for result in together)
    assert len({*first, *second}) == 4


def _sharded_gradients() -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of the whole batch and gradients under FSDP2, or of one process without a process group."""
    torch.manual_seed(0)
    model = InterFormer(MODEL, small_schema())
    batch, rank, world = random_batch(model.schema, LENGTHS), 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), WORLD
        for part in (*model.sequence, *model.interaction, model):
            fully_shard(part)
    own_batch = rows_of(batch, list(range(rank, len(LENGTHS), world)))
    summed = binary_cross_entropy_with_logits(model(own_batch), own_batch.label, reduction="sum")
    (summed * world / len(LENGTHS)).backward()
    loss = summed.detach() / len(LENGTHS)
    if dist.is_initialized():
        dist.all_reduce(loss)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return float(loss), {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


WORKS = (_curve, _logits_of_equal_rows, _sharded_gradients)


def test_sharded_parameters_get_the_gradients_of_one_process(together: list[dict[str, Any]]) -> None:
    loss, expected = _sharded_gradients()
    for found_loss, actual in (actual["_sharded_gradients"] for actual in together):
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert actual.keys() == expected.keys()
        for name, grad in actual.items():
            torch.testing.assert_close(grad, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_the_command_runs_under_torchrun(tmp_path: Path) -> None:
    """There is one report, one checkpoint and one log, and the losses equal those of one process."""
    options = ["--num-users=40", "--mean-length=8", "--epochs=1", "--dropout=0", "--embedding-dropout=0"]
    options += ["--num-layers=1", "--embed-dim=8", "--num-heads=2", "--max-history=12"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    losses, logs = [], []
    for count in (1, WORLD):
        report = tmp_path / f"{count}.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        checkpoint = ["--checkpoint", str(tmp_path / f"{count}.pt"), "--json", str(report)]
        command = [sys.executable, *launcher, "-m", "interformer", "train", *options, *checkpoint]
        completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert completed.returncode == 0, completed.stderr
        losses.append(json.loads(report.read_text())["history"][0]["loss"])
        logs.append(completed.stderr)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert [log.count("epoch  1") for log in logs] == [1, 1]
    state = [torch.load(tmp_path / f"{count}.pt", weights_only=True)["model"] for count in (1, WORLD)]
    assert state[0].keys() == state[1].keys()
