"""The grid's runs are finished once, resumed after a kill, refused under other settings, and reported on failure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interformer.__main__ import main
from interformer.data import SyntheticLaw, synthesize
from interformer.data.clicks import Splits
from interformer.experiments import worker
from interformer.experiments.grid import Grid, Watch
from interformer.experiments.plan import read
from interformer.experiments.runs import Job, Machine, jobs_of
from interformer.experiments.worker import ForbiddenTest

SMALL = "{embed_dim: 4, num_heads: 1, num_layers: 1, cross_rank: 2, interaction_hidden: [4], pffn_hidden: [4], "
PLAN = f"""
name: trial
data: {{reader: synthetic, num_users: 40, impressions_per_user: 4, mean_length: 5}}
seeds: [1, 2]
base:
  model: {SMALL} head_hidden: [4], max_history: 8, dropout: 0.1}}
  training: {{epochs: 2, patience: 9, batch_size: 32, lr: 5e-3}}
variants:
  whole: {{search: {{training.lr: [1e-3, 5e-3]}}}}
  no_pma: {{group: pieces, model: {{num_seeds: 0}}}}
  diverges: {{group: pieces, training: {{lr: 1e30}}, seeds: [1]}}
"""


def _plan(folder: Path, old: str = "", new: str = "") -> Path:
    path = folder / "plan.yaml"
    assert old in PLAN
    path.write_text(PLAN.replace(old, new))
    return path


def _run(*arguments: object) -> int:
    return main(["experiment", *map(str, arguments)])


def _results(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "trial" / "runs").iterdir())}


def _outcome(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a report that does not depend on time."""
    report = {name: result["report"][name] for name in ("best_epoch", "valid", "test", "parameters")}
    return {**report, "curve": [(record["loss"], record["valid"]) for record in result["report"]["history"]]}


class Ran:
    """A whole grid that has run once: its folder, exit status and output."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.status = _run(_plan(folder), "--out", folder, "--jobs", 2)
        self.out, self.err = capsys.readouterr()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    capture: list[Ran] = []

    def once(capsys: pytest.CaptureFixture[str]) -> Ran:
        if not capture:
            capture.append(Ran(tmp_path_factory.mktemp("grid"), capsys))
        return capture[0]

    return once


@pytest.fixture
def grid(ran: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Path:
    """A copy of the results of the whole grid, to continue from."""
    shutil.copytree(ran(capsys).folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_every_run_leaves_its_report_and_a_failed_one_is_shown(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first = ran(capsys)
    assert first.status == 1
    results = _results(first.folder)
    assert list(results) == ["no_pma-seed1", "no_pma-seed2", "whole-seed1", "whole-seed2"]
    for name, result in results.items():
        assert result["identity"]["training"]["seed"] == int(name[-1])
        assert result["identity"]["data"]["clicks"] == {"train": 128, "valid": 16, "test": 16}
        assert result["identity"]["model"]["num_seeds"] == (0 if name.startswith("no_pma") else 2)
        assert set(result["identity"]["versions"]) == {"torch", "interformer-kernels"}
        report = result["report"]
        assert len(report["history"]) == 2
        assert set(report["test"]) == {"auc", "gauc", "logloss", "ne"}
        assert min(report["step_ms"], report["seconds"], report["peak_mib"], report["parameters"]) > 0
        assert result["facts"]["oracle_auc"] > 0.5
    assert len({json.dumps(_outcome(result)) for result in results.values()}) == 4
    assert "diverges-seed1: FAILED: ValueError: Input contains NaN" in first.err
    log = first.folder / "trial" / "unfinished" / "diverges-seed1.log"
    assert f"(see {log})" in first.err
    assert "Traceback" in log.read_text()


def test_the_table_holds_what_is_finished(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first = ran(capsys)
    folder, results = first.folder / "trial", _results(first.folder)
    assert first.out == (folder / "table.md").read_text()
    rows = {row["name"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
    assert list(rows) == ["whole", "no_pma"]
    aucs = [results[f"no_pma-seed{seed}"]["report"]["test"]["auc"] for seed in (1, 2)]
    assert rows["no_pma"]["test"]["auc"]["mean"] == pytest.approx(sum(aucs) / 2)
    assert rows["no_pma"]["difference"]["count"] == 2
    assert {path.name for path in folder.glob("*.png")} == {"curves-pieces.png", "bars-pieces.png"}


def test_a_run_in_a_process_of_its_own_is_a_run_in_this_one(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = _results(ran(capsys).folder)["whole-seed2"]
    plan = read(_plan(ran(capsys).folder))
    clicks = result["identity"]["data"]["clicks"]
    (job,) = jobs_of(plan, plan.choose(("whole",), (2,)), ran(capsys).folder / "again", Machine(), clicks=clicks)
    assert job.identity == result["identity"]
    worker.run(job, Path(), lambda message: None)
    assert _outcome(json.loads(job.result.read_text())) == _outcome(result)


def test_a_finished_run_is_not_repeated(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (grid / "trial" / "runs").iterdir()}
    assert _run(grid / "plan.yaml", "--out", grid, "--only", "whole", "no_pma") == 0
    assert "4 runs are finished, 0 to go" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (grid / "trial" / "runs").iterdir()} == before


def test_a_run_of_another_identity_is_refused(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _results(grid)
    changed = _plan(grid, "num_seeds: 0", "num_seeds: 1")
    assert _run(changed, "--out", grid, "--only", "no_pma") == 2
    printed = capsys.readouterr().err
    assert "runs with other settings exist under these names; --overwrite repeats them" in printed
    for seed in (1, 2):
        assert f"{grid / 'trial' / 'runs' / f'no_pma-seed{seed}.json'}: model.num_seeds was 0 and is 1" in printed
    assert _results(grid) == before

    assert _run(changed, "--out", grid, "--only", "no_pma", "--seeds", "2", "--overwrite") == 0
    printed = capsys.readouterr()
    assert "left out of the table" in printed.err
    after = _results(grid)
    assert after["no_pma-seed2"]["identity"]["model"]["num_seeds"] == 1
    assert after.pop("no_pma-seed2") != before.pop("no_pma-seed2")
    assert after == before
    assert "| no_pma | pieces | 1 |" in printed.out


def test_other_data_is_another_identity(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(_plan(grid, "num_users: 40", "num_users: 50"), "--out", grid, "--only", "whole") == 2
    assert "data.clicks.train was 128 and is 160; " in capsys.readouterr().err


def test_a_failed_runs_settings_are_refused_too_when_they_change(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(_plan(grid, "lr: 1e30", "lr: 1e-3"), "--out", grid, "--only", "diverges") == 2
    assert "unfinished/diverges-seed1.json: training.lr was 1e+30 and is 0.001" in capsys.readouterr().err


def test_a_report_runs_nothing(grid: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("interformer.experiments.grid.start", None)
    (grid / "trial" / "runs" / "whole-seed1.json").unlink()
    assert _run(grid / "plan.yaml", "--out", grid, "--report") == 0
    assert "| whole |  | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "all"], "ValueError: --only must name variants among diverges, no_pma, whole; found 'all'"),
        (["--only", "no_pma", "--tune"], "ValueError: trial: --tune needs a variant with a search, found none"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(_plan(tmp_path), "--out", tmp_path, *arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_data_that_cannot_be_read_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(tmp_path, "reader: synthetic,", "reader: synthetic, num_films: 3,")
    assert _run(plan, "--out", tmp_path) == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1].startswith("ValueError: data: ValueError: reader 'synthetic': options must be among")
    assert not (tmp_path / "trial" / "runs").exists()


# ---------------------------------------------------------------- a kill


class KillAfterEpochs(Watch):
    """Kill the grid's processes after the second epoch, when the first one's checkpoint exists."""

    def __init__(self) -> None:
        self.grid = Grid(Path(), 1, self)
        self.told_error: str | None = None

    def progressed(self, job: Job, message: Mapping[str, Any]) -> None:
        if "valid_auc" in message and message["epoch"] == 1:
            for process in self.grid.processes:
                process.kill()

    def ended(self, job: Job, error: str | None) -> None:
        self.told_error = error


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    plan = read(_plan(tmp_path, "epochs: 2", "epochs: 60"))
    clicks = {"train": 128, "valid": 16, "test": 16}
    job, whole = (
        jobs_of(plan, plan.choose(("whole",), (1,)), tmp_path / name, Machine(), clicks=clicks)[0]
        for name in ("killed", "whole")
    )
    killer = KillAfterEpochs()
    reason = f"ended with status -9 (see {job.unfinished('log')})"
    assert killer.grid.run([job]) == {job.name: reason}
    assert killer.told_error == reason
    assert not job.finished()
    assert job.conflict() is None
    job.unfinished("pt.1.tmp").touch()  # a temporary file of a killed write
    epochs_done = len(torch.load(job.unfinished("pt"))["history"])
    assert 1 <= epochs_done < 60

    assert Grid(Path(), 2, Watch()).run([job, whole]) == {}
    results = [json.loads(path.result.read_text()) for path in (job, whole)]
    assert [result["report"]["resumed_at"] for result in results] == [epochs_done, 0]
    assert _outcome(results[0]) == _outcome(results[1])
    assert list((job.folder / "unfinished").iterdir()) == []


# ---------------------------------------------------------------- tuning


def test_tuning_ranks_by_validation_and_shows_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(_plan(tmp_path), "--out", tmp_path, "--tune", "--only", "whole") == 0
    folder = tmp_path / "trial" / "tune"
    ranked = json.loads((folder / "tune.json").read_text())
    aucs = [trial["valid"]["auc"] for trial in ranked]
    assert aucs == sorted(aucs, reverse=True)
    assert {trial["settings"]["training.lr"] for trial in ranked} == {0.001, 0.005}
    printed = capsys.readouterr()
    assert printed.out == (folder / "tune.md").read_text()
    assert "test" not in printed.out + printed.err
    for path in (folder / "runs").iterdir():
        result = json.loads(path.read_text())
        assert result["report"]["test"] is None
        assert set(result["identity"]["data"]["clicks"]) == {"train", "valid"}
    assert not (tmp_path / "trial" / "runs").exists()


def test_tuning_cannot_read_the_test_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any use of the reader's test part raises: tuning succeeds, measuring fails."""
    splits = replace(
        synthesize(SyntheticLaw(num_users=40, impressions_per_user=4, mean_length=5)), test=ForbiddenTest()
    )
    assert isinstance(splits, Splits)
    monkeypatch.setattr("interformer.data.registry.read", lambda *_, **__: splits)
    plan = read(_plan(tmp_path))
    clicks = worker.describe(plan.data, Path(), measure_test=False)
    for measure_test in (False, True):
        (job,) = jobs_of(
            plan, plan.choose(("whole",), (1,)), tmp_path, Machine(), clicks=clicks, measure_test=measure_test
        )
        if measure_test:
            with pytest.raises(AssertionError, match="test part must not be read"):
                worker.run(job, Path(), lambda message: None)
        else:
            worker.run(job, Path(), lambda message: None)
            assert job.finished()
            job.forget()
    with pytest.raises(AssertionError, match="test part must not be read"):
        worker.describe(plan.data, Path(), measure_test=True)
