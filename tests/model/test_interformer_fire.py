"""Stress tests of cache, checkpoints and experiments: parallel processes, SIGKILL, full disks, flipped bytes.

`INTERFORMER_FIRE=20` runs the larger campaign.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fire
import pytest
import torch
from interformer import InterFormerConfig
from interformer.__main__ import main
from interformer.data import Splits, SyntheticLaw, read_csv, synthesize
from interformer.data.delimited import store
from interformer.experiments.grid import Grid, Watch
from interformer.experiments.plan import read
from interformer.experiments.runs import Job, Machine, jobs_of
from interformer.files import DamagedFileError
from interformer.train import Progress, Run, TrainConfig, write_checkpoint

MORE = int(os.environ.get("INTERFORMER_FIRE", "1"))
SMALL = InterFormerConfig(
    embed_dim=4,
    num_heads=1,
    num_layers=1,
    cross_rank=2,
    interaction_hidden=(4,),
    pffn_hidden=(4,),
    head_hidden=(4,),
    max_history=8,
)
TRAINING = TrainConfig(epochs=2, batch_size=64)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Files and a cache to be damaged."""
    fire.write_files(tmp_path / "data", 60)
    fire.read(tmp_path / "data")
    return tmp_path / "data"


def _flipped(whole: bytes, random_count: int) -> Iterator[bytes]:
    """The contents of a file with one bit flipped: at its ends, around headers, and at random places."""
    size, rng = len(whole), random.Random(len(whole))
    fixed = {0, 1, 5, 8, 9, 10, 40, 127, 128, 129, size // 2, size - 2, size - 1} & set(range(size))
    for position in [*sorted(fixed), *(rng.randrange(size) for _ in range(random_count))]:
        yield whole[:position] + bytes([whole[position] ^ (1 << rng.randrange(8))]) + whole[position + 1 :]


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("touch", [False, True])
def test_processes_that_want_one_cache_at_once(tmp_path: Path, touch: bool) -> None:
    """With `touch` the files change all the time, so that generations are replaced while they are read."""
    for round_ in range(2 * MORE):
        directory = fire.write_files(tmp_path / str(round_), 60)
        started = [fire.start(fire.read_again_and_again, directory, 4, touch) for _ in range(4)]
        assert fire.answers(started) == [0] * 4
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fire.read(directory)
        fire.generation(directory)


def test_a_kill_leaves_nothing_wrong_and_the_next_reader_clears_up(tmp_path: Path) -> None:
    directory, rng = fire.write_files(tmp_path, 1500), random.Random(3)
    began = time.perf_counter()
    expected = read_csv(directory, fire.LAYOUT)
    longest = 1.2 * (time.perf_counter() - began)
    interrupted = 0
    for round_ in range(8 * MORE):
        os.utime(directory / "train.csv", ns=(round_, round_))  # The existing generation is stale.
        process, connection = fire.start(fire.build, directory)
        assert connection.recv() == "go"
        time.sleep(rng.random() * longest)
        process.kill()
        process.join()
        interrupted += any(path.name.startswith(store.BUILDING) for path in (directory / "cache").glob("*/*"))
    assert interrupted, "the kills must have cut off a build"
    os.utime(directory / "train.csv", ns=(1, 99))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The last kill may have left an older generation.
        assert fire.same_splits(fire.read(directory), expected)
    assert {path.name for path in fire.generation(directory).iterdir()} == {
        "about.json",
        *(f"{array}.npy" for array in store.KINDS),
    }


@pytest.mark.parametrize("room", [100, 2_000, 10_000])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, room: int) -> None:
    directory = fire.write_files(tmp_path, 60)
    (message,) = fire.answers([fire.start(fire.build_on_a_full_disk, directory, room)])
    assert message.startswith("[Errno 27] File too large: "), message
    assert {path.name for path in (directory / "cache").glob("*/*")} == {store.LOCK}
    fire.read(directory)


def test_every_damaged_byte_of_a_generation_is_seen(directory: Path) -> None:
    expected, place = fire.read(directory), fire.generation(directory)
    tried = refused = 0
    for path in sorted(place.iterdir()):
        whole = path.read_bytes()
        cut = [whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"]
        for damaged in (*cut, *_flipped(whole, 8 * MORE)):
            path.unlink()  # It must not be overwritten, because `expected` has mapped it.
            path.write_bytes(damaged)
            tried += 1
            message = None
            try:
                assert fire.same_splits(store.load(expected.name, place), expected), f"{path.name} was served damaged"
            except store.BrokenStoreError as error:
                message = str(error)
            assert message is None or (path.name in message and "\n" not in message)
            refused += message is not None
        path.write_bytes(whole)
    assert refused > 0.95 * tried
    assert fire.same_splits(store.load(expected.name, place), expected)


def test_arrays_of_two_generations_do_not_mix(tmp_path: Path) -> None:
    first, second = (fire.write_files(tmp_path / name, rows) for name, rows in (("one", 60), ("two", 60)))
    (second / "train.csv").write_bytes((second / "train.csv").read_bytes().replace(b"\n1,", b"\n0,"))
    expected = fire.read(first)
    fire.read(second)
    for name in ("label.npy", "events.npy", "about.json"):
        mixed = tmp_path / name
        shutil.copytree(fire.generation(first), mixed)
        shutil.copy(fire.generation(second) / name, mixed / name)
        try:
            assert fire.same_splits(store.load(expected.name, mixed), expected)
        except store.BrokenStoreError:
            continue
        assert (mixed / name).read_bytes() == (fire.generation(first) / name).read_bytes()


def test_what_a_reader_has_mapped_stays(directory: Path) -> None:
    before = fire.read(directory)
    copies = {name: getattr(before.train, name).clone() for name in fire.ARRAYS}
    fire.write_files(directory, 40)
    with pytest.warns(UserWarning, match="stale"):
        after = fire.read(directory)
    assert len(after.train) < len(before.train)
    assert all(torch.equal(getattr(before.train, name), copy) for name, copy in copies.items())


def test_files_that_change_while_they_are_read_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = fire.write_files(tmp_path, 60)
    right = store.Target.array

    def change(self: store.Target, name: str, shape: tuple[int, ...]) -> Any:
        os.utime(directory / "train.csv", ns=(1, 1))
        return right(self, name, shape)

    monkeypatch.setattr(store.Target, "array", change)
    for options in ({}, {"cache": directory / "cache"}):
        os.utime(directory / "train.csv", ns=(2, 2))
        with pytest.raises(ValueError, match="wanted files that do not change while they are read"):
            read_csv(directory, fire.LAYOUT, **options)  # type: ignore[arg-type]
    assert {path.name for path in (directory / "cache").glob("*/*")} == {store.LOCK}


def test_left_overs_of_an_older_version_are_cleared_up(directory: Path) -> None:
    (place,) = (directory / "cache").iterdir()
    shutil.rmtree(fire.generation(directory))
    (place / "about.json").write_text("{}")
    (place / "label.npy").touch()
    with pytest.warns(UserWarning, match="stale"):
        fire.read(directory)
    fire.generation(directory)


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def splits() -> Splits:
    return synthesize(SyntheticLaw(num_users=40, impressions_per_user=4, mean_length=5, max_history=8))


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return set(first) == set(second) and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(_equal, first, second))
    return bool(first == second)


def test_a_damaged_checkpoint_is_one_line_and_changes_nothing(splits: Splits, tmp_path: Path) -> None:
    run, path = Run(splits, SMALL, TRAINING), tmp_path / "run.pt"
    run.train_epoch(Progress())
    run.save(path)
    whole, expected = path.read_bytes(), run.state()
    fresh = Run(splits, SMALL, TRAINING)
    untouched = {name: value.clone() for name, value in fresh.model.state_dict().items()}
    damages = [b"", whole[:4], whole[: len(whole) // 2], whole[:-1], whole[1:], whole + b"\0", bytes(len(whole))]
    damages += _flipped(whole, 60 * MORE)
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError) as caught:
            fresh.load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert message.endswith("; remove it to start again")
        assert "\n" not in message
        assert fresh.history == []
        assert _equal(fresh.model.state_dict(), untouched)
    path.write_bytes(whole)
    fresh.load(path)
    assert _equal(fresh.state(), expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("rng"), "the entries"),
        (lambda state: state.update(rng=torch.zeros(3)), "random numbers"),
        (lambda state: state.update(rng=None), "random numbers"),
        (lambda state: state.update(model=5), "parameters"),
        (lambda state: state["model"].popitem(), "parameters"),
        (lambda state: state["model"].update(dict.fromkeys([next(iter(state["model"]))], torch.ones(1))), "parameters"),
        (lambda state: state["model"].update({k: v.double() for k, v in state["model"].items()}), "parameters"),
        (lambda state: state.update(best={}), "best parameters"),
        (lambda state: state.update(best_epoch=7), "best_epoch 7 in 1 epochs"),
        (lambda state: state.update(history=[{"epoch": 0}]), "history"),
        (lambda state: state.update(history=None), "history"),
        (lambda state: state["optimizer"]["param_groups"].pop(), "optimizer"),
        (lambda state: state["optimizer"]["param_groups"][0].update(weight_decay=9.0), "optimizer"),
        (lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.ones(1)), "optimizer"),
        (lambda state: state["optimizer"]["state"].update({999: {}}), "optimizer"),
        (lambda state: state.update(optimizer=[]), "optimizer"),
        (lambda state: state.update(step_seconds=[None]), "times"),
        (lambda state: state.update(identity=5), "this run is not the one"),
        (lambda state: state["identity"].update({"format": 1}), "format was 1 and is"),
    ],
)
def test_a_checkpoint_of_other_contents_is_one_line(splits: Splits, tmp_path: Path, change: Any, reason: str) -> None:
    run, path = Run(splits, SMALL, TRAINING), tmp_path / "run.pt"
    run.train_epoch(Progress())
    run.save(path)
    state = torch.load(path)
    change(state)
    write_checkpoint(path, state)
    fresh = Run(splits, SMALL, TRAINING)
    untouched = {name: value.clone() for name, value in fresh.model.state_dict().items()}
    with pytest.raises(ValueError, match=reason) as caught:
        fresh.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert _equal(fresh.model.state_dict(), untouched)


# ---------------------------------------------------------------- the commands

OPTIONS = ["--num-users=40", "--impressions-per-user=4", "--mean-length=5", "--epochs=1", "--embed-dim=4"]
OPTIONS += ["--num-heads=1", "--head-hidden=4", "--interaction-hidden=4", "--pffn-hidden=4", "--max-history=8"]


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    *_, last = capsys.readouterr().err.splitlines()
    return last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--device=nonsense"],
            "ValueError: device must be one that PyTorch knows, like cpu or cuda:0; found 'nonsense'",
        ),
        (["--device=cuda:99"], "ValueError: device must be one that PyTorch can use here; found 'cuda:99'"),
        (["--device=meta"], "ValueError: device must be one that PyTorch can use here; found 'meta'"),
        (["--mean-length=1e300"], "ValueError: SyntheticLaw: mean_length must be at most 1e+09, found 1e+300"),
        (["--mean-length=nan"], "ValueError: SyntheticLaw: mean_length must be"),
        (["--num-users=99999999999999999999"], "ValueError: SyntheticLaw: num_users must be"),
        (["--lr=inf"], "ValueError: lr must be finite in float32, found inf"),
        (["--lr=nan"], "ValueError: lr must be above 0, found nan"),
        (["--lr=1e300"], "ValueError: lr must be finite in float32, found 1e+300"),
        (["--lr=1e30"], "ValueError: Input contains NaN or infinity: the model's logits are not finite"),
        (["--weight-decay=inf"], "ValueError: weight_decay must be finite in float32, found inf"),
        (["--embedding-std=1e39"], "ValueError: embedding_std must lie in [0, inf), found 1e+39"),
        (["--seed=-1"], "ValueError: seed must be 0 to 4294967295, found -1"),
        (["--seed=99999999999999999999"], "ValueError: seed must be 0 to 4294967295"),
        (["--threads=100000"], "ValueError: threads must be 1 to 1024, found 100000"),
        (["--embed-dim=2000000000"], "RuntimeError: not enough memory for these sizes: "),
        (["--backend=triton"], "RuntimeError: "),
        (["--checkpoint=/dev/full"], "OSError: [Errno 28] No space left on device: '/dev/full'"),
        (["--json=/dev/full"], "OSError: [Errno 28] No space left on device: '/dev/full'"),
        (["--json=/"], "IsADirectoryError: [Errno 21] wanted a file, found a directory: '/'"),
        (["--checkpoint=/proc/x"], "FileNotFoundError: [Errno 2] No such file or directory: '/proc/x"),
        (["--checkpoint=/", "--resume"], "IsADirectoryError: [Errno 21] "),
        (["--data=/dev/null"], "FileNotFoundError: /dev/null: wanted a directory"),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *OPTIONS, *arguments]) == 2
    assert _one_line(capsys).startswith(message)


def test_a_damaged_checkpoint_ends_the_command_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(b"PK\3\4 no more")
    assert main(["train", *OPTIONS, f"--checkpoint={path}", "--resume"]) == 2
    line = _one_line(capsys)
    assert line.startswith(
        f"DamagedFileError: {path}: wanted a checkpoint of this program, with its checksum at the end"
    )
    assert line.endswith("; remove it to start again")


@pytest.mark.parametrize("mistake", [lambda: 1 / 0, lambda: None + 1, lambda: int("x"), lambda: [][1]])  # type: ignore[operator]
def test_a_mistake_of_the_program_keeps_its_traceback(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interformer._cli.train.load", lambda *_: mistake())
    with pytest.raises((ZeroDivisionError, TypeError, ValueError, IndexError)):
        main(["train", *OPTIONS])


# ---------------------------------------------------------------- experiments

PLAN = """
name: trial
data: {reader: synthetic, num_users: 40, impressions_per_user: 4, mean_length: 5}
seeds: [1, 2]
base:
  model: {embed_dim: 4, num_heads: 1, num_layers: 1, interaction_hidden: [4], pffn_hidden: [4], max_history: 8}
  training: {epochs: 2, batch_size: 32}
variants: {whole: {}}
"""


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment run by two grids at once."""
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "plan.yaml").write_text(PLAN)
    plan = read(folder / "plan.yaml")
    clicks = {"train": 128, "valid": 16, "test": 16}
    jobs = jobs_of(plan, plan.variants, folder / "trial", Machine(), clicks=clicks)
    with ThreadPoolExecutor(2) as pool:  # Each grid starts a process for every job.
        assert list(pool.map(lambda _: Grid(Path(), 2, Watch()).run(jobs), range(2))) == [{}, {}]
    assert main(["experiment", str(folder / "plan.yaml"), "--out", str(folder), "--report"]) == 0
    return folder


def test_two_grids_share_the_runs_of_an_experiment(grid: Path) -> None:
    runs = sorted((grid / "trial" / "runs").iterdir())
    assert [path.name for path in runs] == ["whole-seed1.json", "whole-seed2.json"]
    assert all(len(json.loads(path.read_text())["report"]["history"]) == 2 for path in runs)
    assert list((grid / "trial" / "unfinished").iterdir()) == []
    assert {path.suffix for path in (grid / "trial").iterdir()} == {"", ".json", ".md", ".png"}


def test_a_damaged_result_is_told_left_out_and_run_anew(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(grid, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "trial" / "runs" / "whole-seed1.json"
    before = path.read_text()
    path.write_text(before.replace('"best_epoch": ', '"best_epoch": 1'))
    command = ["experiment", str(tmp_path / "plan.yaml"), "--out", str(tmp_path)]
    assert main([*command, "--report"]) == 0
    printed = capsys.readouterr()
    assert f"left out of the table: {path}: damaged: its checksum does not match" in printed.err
    assert "| whole |  | 1 |" in printed.out
    assert main(command) == 2
    assert f"--overwrite repeats them: {path}: damaged" in _one_line(capsys)
    assert main([*command, "--overwrite"]) == 0
    assert json.loads(path.read_text())["report"]["best_epoch"] == json.loads(before)["report"]["best_epoch"]


def test_a_job_that_another_process_runs_is_not_forgotten(tmp_path: Path) -> None:
    job = Job("one", tmp_path, {"training": {"seed": 1}})
    job.finish({"test": None}, {})
    with job.lock(), pytest.raises(ValueError, match="another process is running it"):
        job.forget()
    assert job.finished()
    job.forget()
    assert not job.finished()
