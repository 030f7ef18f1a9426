"""Training learns, stops early and resumes after a kill; the command line works as documented."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interformer import Batch, InterFormerConfig, Schema
from interformer.__main__ import build_parser, main
from interformer._cli.train import load, write_json
from interformer.data import Splits, SyntheticLaw, synthesize
from interformer.experiments.worker import ForbiddenTest
from interformer.models import MODELS
from interformer.train import EpochRecord, Progress, Run, TrainConfig, make_optimizer, train, write_checkpoint
from torch import nn

MODEL = InterFormerConfig(
    embed_dim=8,
    num_heads=2,
    num_layers=1,
    cross_rank=8,
    interaction_hidden=(16,),
    pffn_hidden=(8,),
    head_hidden=(16,),
    dropout=0.1,
    embedding_dropout=0.1,
    embedding_std=0.5,
    max_history=12,
)
TRAINING = TrainConfig(epochs=3, batch_size=64, lr=5e-3, lr_decay=0.9, weight_decay=0.1, embedding_weight_decay=0.1)


def _as_option(name: str, value: object) -> str:
    text = ("no", "yes")[value] if isinstance(value, bool) else value
    text = ",".join(map(str, value)) if isinstance(value, tuple) else text
    return f"--{name.replace('_', '-')}={text}"


OPTIONS = [
    _as_option(name, value)
    for name, value in {**vars(MODEL), **vars(TRAINING), "num_users": 60, "mean_length": 8}.items()
    if name != "backend"
]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return synthesize(SyntheticLaw(num_users=100, impressions_per_user=6, mean_length=8, max_history=12))


class Killed(Exception):  # noqa: N818
    """Raised in place of the signal."""


class KillAfter(Progress):
    """Interrupts the run in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.now, self.steps = epoch, -1, 0

    def start_epoch(self, epoch: int, impressions: int) -> None:
        self.now, self.steps = epoch, 0

    def step(self, impressions: int, tokens: int, loss: float) -> None:
        self.steps += 1
        if self.now == self.epoch and self.steps == 3:
            raise Killed


def _curve(history: list[EpochRecord]) -> list[tuple[int, float, dict[str, float]]]:
    return [(record.epoch, record.loss, record.valid) for record in history]


def test_training_learns_the_synthetic_law() -> None:
    splits = synthesize(SyntheticLaw(num_users=300, num_items=20, mean_length=6, max_history=12))
    config = replace(MODEL, dropout=0.0, embedding_dropout=0.0)
    report = train(splits, config, replace(TRAINING, lr=1e-2, weight_decay=0.0, embedding_weight_decay=0.0))
    losses = [record.loss for record in report.history]
    assert losses[-1] < losses[0] - 0.02
    assert (report.valid.auc + report.test.auc) / 2 > 0.6
    assert report.valid.ne < 1


@pytest.mark.parametrize("killed_in", [1, 2])
def test_a_killed_and_resumed_run_is_the_uninterrupted_one(tmp_path: Path, splits: Splits, killed_in: int) -> None:
    whole = train(splits, MODEL, TRAINING)
    checkpoint = tmp_path / "runs" / "run.pt"
    with pytest.raises(Killed):
        train(splits, MODEL, TRAINING, checkpoint=checkpoint, progress=KillAfter(killed_in))
    torch.rand(5)  # The resuming process would have another random state.
    resumed = train(splits, MODEL, TRAINING, checkpoint=checkpoint, resume=True)
    assert resumed.resumed_at == killed_in
    assert _curve(resumed.history) == _curve(whole.history)
    assert (resumed.best_epoch, resumed.valid, resumed.test) == (whole.best_epoch, whole.valid, whole.test)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["run.pt"]


def test_resuming_a_finished_run_only_measures(tmp_path: Path, splits: Splits) -> None:
    checkpoint = tmp_path / "run.pt"
    first = train(splits, MODEL, TRAINING, checkpoint=checkpoint)
    resumed = train(splits, MODEL, TRAINING, checkpoint=checkpoint, resume=True, progress=KillAfter(0))
    assert (resumed.valid, resumed.test, resumed.step_ms) == (first.valid, first.test, first.step_ms)
    assert resumed.seconds >= first.history[-1].seconds


def test_a_finished_run_goes_on_with_more_epochs(tmp_path: Path, splits: Splits) -> None:
    checkpoint = tmp_path / "run.pt"
    patient = replace(TRAINING, patience=9)
    train(splits, MODEL, replace(patient, epochs=1), checkpoint=checkpoint)
    longer = train(splits, MODEL, patient, checkpoint=checkpoint, resume=True)
    assert _curve(longer.history) == _curve(train(splits, MODEL, patient).history)


def test_a_run_leaves_the_callers_random_state(splits: Splits) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(splits, MODEL, replace(TRAINING, epochs=1))
    assert torch.get_rng_state().equal(before)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, splits: Splits) -> None:
    checkpoint = tmp_path / "run.pt"
    run = Run(splits, MODEL, TRAINING)
    run.save(checkpoint)
    with pytest.raises(ValueError, match=r"model\.num_seeds was 2 and is 3; training\.seed was 1 and is 2"):
        Run(splits, replace(MODEL, num_seeds=3), replace(TRAINING, seed=2)).load(checkpoint)
    Run(splits, replace(MODEL, backend="reference"), replace(TRAINING, epochs=9)).load(checkpoint)
    torch.save({"weights": 1}, checkpoint)
    with pytest.raises(ValueError, match="wanted a checkpoint of this program"):
        run.load(checkpoint)


def test_resuming_needs_a_checkpoint_and_starts_where_there_is_none_yet(tmp_path: Path, splits: Splits) -> None:
    with pytest.raises(ValueError, match="resume needs a checkpoint to resume from, found None"):
        train(splits, MODEL, TRAINING, resume=True)

    messages: list[str] = []

    class Listener(Progress):
        def say(self, message: str) -> None:
            messages.append(message)

    one_epoch = replace(TRAINING, epochs=1)
    report = train(splits, MODEL, one_epoch, checkpoint=tmp_path / "run.pt", resume=True, progress=Listener())
    assert report.resumed_at == 0
    assert "no checkpoint yet" in messages[0]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    write_checkpoint(path, {"epoch": 1})
    with pytest.raises(AttributeError):
        write_checkpoint(path, {"epoch": 2, "cannot": lambda: None})
    assert torch.load(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_early_stopping_keeps_the_best_epoch(splits: Splits) -> None:
    worsening = iter([0.6, 0.7, 0.65, 0.69, 0.5])

    class Scripted(Run):
        def evaluate(self, clicks: Any) -> Any:
            return replace(super().evaluate(clicks), auc=next(worsening))

    run = Scripted(splits, MODEL, replace(TRAINING, epochs=9, patience=2))
    states = []
    while not run.finished():
        run.train_epoch(Progress())
        states.append(run.model.head[0].weight.detach().clone())
    assert len(run.history) == 4
    assert run.best_epoch == 1
    assert run.best["head.0.weight"].equal(states[1])


def test_every_parameter_is_in_one_group_of_its_own_decay(splits: Splits) -> None:
    model = Run(splits, MODEL, TRAINING).model
    config = replace(TRAINING, weight_decay=0.25, embedding_weight_decay=0.5)
    decay = {
        id(p): group["weight_decay"] for group in make_optimizer(model, config).param_groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        expected = 0.5 if ".tables." in name else 0.25 if parameter.dim() > 1 else 0.0
        assert decay.pop(id(parameter)) == expected, name
    assert not decay


def test_a_model_of_tables_and_vectors_alone_is_trained(monkeypatch: pytest.MonkeyPatch, splits: Splits) -> None:
    """Any model of the registry works; its tables are its `nn.Embedding`s, at any depth."""

    class Floor(nn.Module):
        def __init__(self, config: InterFormerConfig, schema: Schema) -> None:
            super().__init__()
            self.weights = nn.ModuleList(nn.Embedding(schema.tables[field.table], 1) for field in schema.categorical)
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, batch: Batch) -> torch.Tensor:
            return self.bias + sum(table(batch.categorical[:, i])[:, 0] for i, table in enumerate(self.weights))

    monkeypatch.setitem(MODELS, "floor", Floor)
    run = Run(splits, MODEL, TRAINING, model="floor")
    tables, matrices, vectors = run.optimizer.param_groups
    assert [id(p) for p in tables["params"]] == [id(table.weight) for table in run.model.weights]
    assert matrices["params"] == []
    assert vectors["params"][0] is run.model.bias
    report = train(splits, MODEL, TRAINING, model="floor")
    assert report.parameters == sum(splits.schema.tables[field.table] for field in splits.schema.categorical) + 1
    assert report.history[-1].loss < report.history[0].loss


def test_the_kind_of_model_is_part_of_a_checkpoint(tmp_path: Path, splits: Splits) -> None:
    run = Run(splits, MODEL, TRAINING)
    run.save(tmp_path / "run.pt")
    run.kind = "din"
    with pytest.raises(ValueError, match="kind was 'interformer' and is 'din'"):
        run.load(tmp_path / "run.pt")
    with pytest.raises(ValueError, match="model must be one of interformer.*; found 'dien'"):
        train(splits, MODEL, TRAINING, model="dien")


def test_without_measuring_the_test_part_is_not_looked_at(tmp_path: Path, splits: Splits) -> None:
    whole = train(splits, MODEL, TRAINING)
    blind = replace(splits, test=ForbiddenTest())
    with pytest.raises(AssertionError, match="must not be read"):
        train(blind, MODEL, TRAINING)
    report = train(blind, MODEL, TRAINING, measure_test=False, checkpoint=tmp_path / "run.pt")
    assert (_curve(report.history), report.valid, report.test) == (_curve(whole.history), whole.valid, None)
    with pytest.raises(ValueError, match=r"data\.test was None and is 60"):
        Run(splits, MODEL, TRAINING).load(tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, found 0"),
        ({"patience": 0}, "patience must be at least 1, found 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"lr": 0.0}, "lr must be above 0, found 0"),
        ({"lr_decay": 1.5}, r"lr_decay must lie in \(0, 1\], found 1.5"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, found -1"),
    ],
)
def test_bad_training_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TRAINING, **change)


def test_parts_that_cannot_be_trained_on_are_named(splits: Splits) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"splits\.valid must hold at least one impression, found none"):
        train(replace(splits, valid=splits.valid.select(none)), MODEL, TRAINING)
    with pytest.raises(ValueError, match="rate must lie strictly between 0 and 1, found 1"):
        train(replace(splits, train=splits.train.select(splits.train.label == 1)), MODEL, TRAINING)


# ---------------------------------------------------------------- the command line


def test_the_report_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "report.json"
    assert main(["train", *OPTIONS, "--json", str(target)]) == 0
    report = json.loads(target.read_text())
    assert report["model"] == {**MODEL.to_dict(), "literal": False, "backend": None}
    assert report["training"] == vars(TRAINING)
    assert report["data"]["clicks"] == {"train": 384, "valid": 48, "test": 48}
    assert 1 <= len(report["history"]) <= TRAINING.epochs
    assert report["kind"] == "interformer"
    assert set(report["test"]) == {"auc", "gauc", "logloss", "ne"}
    assert report["valid"] == report["history"][report["best_epoch"]]["valid"]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"test  AUC {report['test']['auc']:.4f}" in printed.err


def test_json_has_null_for_what_is_undefined(tmp_path: Path) -> None:
    write_json(str(tmp_path / "x.json"), {"test": {"auc": float("nan"), "ne": 1.0}, "history": [float("nan")]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"test": {"auc": None, "ne": 1.0}, "history": [None]}


def test_json_goes_to_standard_output_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *OPTIONS, "--epochs", "1", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["best_epoch"] == 0


def test_the_seed_changes_the_run_and_not_the_data() -> None:
    first, second = (build_parser().parse_args(["train", *OPTIONS, f"--seed={seed}"]) for seed in (1, 2))
    assert load(first, 9).train.label.equal(load(second, 9).train.label)


def test_movielens_is_trained_on_its_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    films = [f"{i}\t{1990 + i % 5}\tDrama" for i in range(20)]
    people = [f"{u}\t30\tM\tnone" for u in range(5)]
    ratings = [f"{u}\t{i}\t{1 + (7 * u + 3 * i) % 5}\t{i}" for u in range(5) for i in range(20)]
    header = {
        "item": "item_id:token\trelease_year:token\tclass:token_seq",
        "user": "user_id:token\tage:token\tgender:token\toccupation:token",
        "inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float",
    }
    for suffix, lines in (("item", films), ("user", people), ("inter", ratings)):
        (tmp_path / f"ml.{suffix}").write_text("\n".join([header[suffix], *lines]))
    assert main(["train", "--data", str(tmp_path), *OPTIONS, "--epochs=1"]) == 0
    assert "ml train: 80 clicks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/place"], "FileNotFoundError: /no/such/place: wanted a directory"),
        (["--embed-dim=10"], "ValueError: embed_dim must be a multiple of 2 * num_heads"),
        (["--threads=0"], "ValueError: threads must be at least 1, found 0"),
        (["--resume"], "ValueError: train: resume needs a checkpoint"),
        (["--num-users=2"], "ValueError: SyntheticLaw: num_users must be at least 10, found 2"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *OPTIONS, *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_a_process_killed_by_a_signal_is_resumed(tmp_path: Path) -> None:
    """SIGKILL in the third epoch or later, then `--resume`: the report equals that of an uninterrupted run."""
    checkpoint = tmp_path / "run.pt"
    arguments = ["train", *OPTIONS, "--patience=50"]
    command = [sys.executable, "-m", "interformer", *arguments, f"--checkpoint={checkpoint}", "--epochs=50"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch  2"):
                process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    epochs_done = len(torch.load(checkpoint)["history"])
    assert 1 <= epochs_done < 50

    def report(*extra: str) -> dict[str, Any]:
        target = tmp_path / "report.json"
        assert main([*arguments, f"--epochs={epochs_done + 1}", f"--json={target}", *extra]) == 0
        result: dict[str, Any] = json.loads(target.read_text())
        for record in (result, *result["history"]):
            del record["seconds"]
        for cost in ("step_ms", "impressions_per_second", "peak_mib"):
            assert result.pop(cost) > 0
        return result

    resumed, whole = report(f"--checkpoint={checkpoint}", "--resume"), report()
    assert resumed.pop("resumed_at") == epochs_done
    assert whole.pop("resumed_at") == 0
    assert resumed == whole
