"""The command line: its output, its files, its requirements, and its exit status for CI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import interformer_kernels
from interformer_kernels import testing
from interformer_kernels._cli import parity
from interformer_kernels.cli import main

ROOT = Path(__file__).parents[2]
# Small enough for a test: one op, one dtype.
SMALL = ["--op", "personalized_ffn", "--dtype", "float32"]


def run(*arguments: str, before: str = "", blocked: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in its own process; `before` runs first, and modules named in `blocked` cannot be imported."""
    block = f"import sys\nfor name in {blocked.split()!r}: sys.modules[name] = None\n"
    program = f"{block}{before}\nfrom interformer_kernels.cli import main\nraise SystemExit(main(sys.argv[1:]))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def results(path: Path) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = json.loads(path.read_text())
    return result


# ---------------------------------------------------------------- info


def test_info_as_json_names_versions_and_backends() -> None:
    completed = run("info", "--json")
    assert completed.returncode == 0, completed.stderr
    result = json.loads(completed.stdout)
    assert result["versions"]["torch"] == torch.__version__
    assert set(result["backends"]) == set(testing.OPS)
    ffn = result["backends"]["personalized_ffn"]["cpu"]["float64"]
    assert ffn["cannot_serve"]["triton"]
    assert ffn["backend"] not in ffn["cannot_serve"]


@pytest.mark.parametrize("blocked", ["", "rich", "triton", "interformer_kernels._C numpy rich triton"])
def test_info_needs_torch_alone(blocked: str) -> None:
    completed = run("info", blocked=blocked)
    assert completed.returncode == 0, completed.stderr
    for op in testing.OPS:
        assert op in completed.stdout
    if "_C" in blocked:
        assert "missing: the native module interformer_kernels._C cannot be imported" in completed.stdout


def test_it_is_a_module_too() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "interformer_kernels", "--help"]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert completed.returncode == 0, completed.stderr
    for name in ("info", "parity", "bench", "demo", "tune"):
        assert name in completed.stdout


# ---------------------------------------------------------------- parity


def test_parity_passes_and_writes_every_quantity(tmp_path: Path) -> None:
    target = tmp_path / "made" / "parity.json"
    completed = run("parity", *SMALL, "--backend", "reference", "--json", str(target), blocked="rich numpy")
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "0 breaches" in completed.stdout
    rows = results(target)
    cases = {str(case) for case in testing.cases("personalized_ffn")}
    assert {row["case"] for row in rows} == cases
    assert {row["quantity"] for row in rows} == {"out", "dx", "dweight", "dbias", "dresidual"}
    assert all(row["ok"] and row["share"] <= 1 for row in rows)
    assert f"{len(rows)} quantities compared" in completed.stdout


def test_parity_ends_with_1_on_a_planted_breach(tmp_path: Path) -> None:
    plant = """
import interformer_kernels as package
right = package.personalized_ffn
package.personalized_ffn = lambda *args, **options: right(*args, **options) * 1.001
"""
    target = tmp_path / "parity.json"
    completed = run("parity", *SMALL, "--json", str(target), before=plant)
    assert completed.returncode == 1, completed.stderr
    assert "BREACH: personalized_ffn reference float32 cpu, case 'plain', out: error" in completed.stdout
    assert any(not row["ok"] and row["share"] > 1 for row in results(target))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_parity_make_the_whole(parts: int, tmp_path: Path) -> None:
    """The processes append to one file, each line with the step's name."""
    lines, whole = tmp_path / "made" / "lines.jsonl", tmp_path / "whole.json"
    arguments = ["parity", *SMALL, "--backend", "reference"]
    assert main([*arguments, "--json", str(whole)]) == 0
    for k in range(1, parts + 1):
        assert main([*arguments, "--part", f"{k}/{parts}", "--lines", str(lines), "--step", f"piece {k}"]) == 0
    result = lines_of(lines)
    assert {record.pop("step") for record in result} == {f"piece {k}" for k in range(1, parts + 1)}
    assert {record.pop("kind") for record in result} == {"parity"}
    assert result == results(whole)


def test_lines_of_parity_stand_whatever_becomes_of_it(tmp_path: Path) -> None:
    """Results of cases compared before the process was killed remain."""
    plant = """
import os
from interformer_kernels import testing
right = testing.compare
testing.compare = lambda case, *rest, **more: os._exit(9) if case.name == "plain" else right(case, *rest, **more)
"""
    target = tmp_path / "lines.jsonl"
    completed = run("parity", *SMALL, "--backend", "reference", "--lines", str(target), before=plant)
    assert completed.returncode == 9
    names = [case.name for case in testing.cases("personalized_ffn")]
    assert {record["case"] for record in lines_of(target)} == set(names[: names.index("plain")]) != set()


@pytest.mark.parametrize("text", ["0/3", "4/3", "2", "a/b", "1/0", "-1/2", "1/" + "9" * 5000])
def test_a_part_that_cannot_be_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["parity", *SMALL, f"--part={text}"])
    assert ended.value.code == 2
    assert "argument --part: wanted K/N, K from 1 to N, found " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [(lambda out: out * torch.nan, "error nan"), (lambda out: out[..., :-1], "RuntimeError")],
    ids=["nan", "raises"],
)
def test_parity_counts_nan_and_exceptions_as_breaches(
    wrong: Callable[[Tensor], Tensor],
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = interformer_kernels.personalized_ffn
    plant = lambda *tensors, **options: wrong(right(*tensors, **options))  # noqa: E731
    monkeypatch.setattr(interformer_kernels, "personalized_ffn", plant)
    target = tmp_path / "parity.json"
    assert main(["parity", *SMALL, "--json", str(target)]) == 1
    assert shown in capsys.readouterr().out
    assert any(row["error"] is None and not row["ok"] for row in results(target))  # read back: no NaN in the JSON


def test_parity_lets_mistakes_of_its_own_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interformer_kernels, "personalized_ffn", lambda *tensors, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["parity", *SMALL])


def test_parity_fails_where_a_named_backend_cannot_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", *SMALL, "--backend", "triton", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "BREACH: personalized_ffn triton float32 cpu" in shown
    assert "cannot serve on cpu: " in shown
    assert "0 quantities compared, 1 breaches" in shown


def test_parity_fails_where_the_native_module_is_missing_and_named() -> None:
    named = ["--op", "pma_pooling", "--dtype", "float32", "--backend", "cpu"]
    completed = run("parity", *named, blocked="interformer_kernels._C")
    assert completed.returncode == 1
    assert "interformer_kernels._C cannot be imported" in completed.stdout


@pytest.mark.parametrize(
    "arguments", [["parity", "--backend", "magic"], ["parity", "--op", "softmax"], ["nothing"], []]
)
def test_wrong_arguments_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: interformer-kernels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "budget", "ok"),
    [(0.0, 0.0, True), (1.0, 1.0, True), (1.1, 1.0, False), (1e-30, 0.0, False), (float("nan"), 1.0, False)],
)
def test_verdict(error: float, budget: float, ok: bool) -> None:
    assert parity.Result("op", "cpu", "float32", "cpu", "case", "out", error, budget).ok is ok


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("/dev/full", "OSError: [Errno 28] No space left on device: '/dev/full'"),
        ("/", "IsADirectoryError: [Errno 21] wanted a file, found a directory: '/'"),
        ("/proc/none/x", "FileNotFoundError: [Errno 2] No such file or directory: '/proc/none'"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line_and_status_2(
    target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["parity", *SMALL, "--backend", "reference"]
    for option in ("--json", "--lines"):
        assert main([*small, option, target]) == 2
        assert capsys.readouterr().err.splitlines() == [message]


@pytest.mark.parametrize(
    "arguments", [["--rows", "0"], ["--threads", "-1"], ["--seconds", "nan"], ["--rows", "9" * 5000]]
)
def test_the_bench_takes_no_numbers_that_cannot_be(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    assert ended.value.code == 2
    assert f"argument {arguments[0]}: wanted a " in capsys.readouterr().err


def test_the_bench_names_a_length_file_that_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "5core_beauty.json"
    for content in ("[1, 2", "[]", "[1, -2]", '{"a": 1}', "[" * 5000):
        file.write_text(content)
        assert main(["bench", "--quick", "--data", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"ValueError: {file}: wanted ")


# ---------------------------------------------------------------- bench

# Small enough for a test: one op on one distribution of lengths, four rows, timed very briefly.
TINY = ["bench", "--op", "personalized_ffn", "--law", "movielens", "--rows", "4", "--seconds", "0", "--threads", "1"]


def test_bench_needs_torch_alone_to_measure_and_print(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    completed = run(*TINY, "--quick", "--json", str(target), blocked="rich matplotlib numpy pytest triton")
    assert completed.returncode == 0, completed.stderr
    assert "movielens" in completed.stdout
    assert {record["rows"] for record in json.loads(target.read_text())["measurements"]} == {4}


def test_bench_says_before_measuring_that_pictures_need_an_extra(tmp_path: Path) -> None:
    completed = run(*TINY, "--out", str(tmp_path / "out"), blocked="matplotlib")
    assert completed.returncode == 1
    assert completed.stderr == (
        "bench: --out draws pictures, which needs matplotlib: pip install 'interformer-kernels[bench]'\n"
    )
    assert not (tmp_path / "out").exists()


def test_bench_has_the_options_of_the_module() -> None:
    helps = []
    for command in (["interformer_bench"], ["interformer_kernels", "bench"]):
        completed = subprocess.run(
            [sys.executable, "-m", *command, "--help"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            timeout=120,
        )
        assert completed.returncode == 0, completed.stderr
        helps.append(completed.stdout.partition("options:")[2])
    assert "--law" in helps[0]
    assert helps[0] == helps[1]


def test_bench_says_that_it_is_not_installed_and_others_do_without_it() -> None:
    completed = run(*TINY, blocked="interformer_bench")
    assert completed.returncode == 1
    assert completed.stderr.endswith("interformer_bench is not installed; pip install . installs both\n")
    assert run("info", blocked="interformer_bench").returncode == 0


# ---------------------------------------------------------------- demo


def test_demo_says_what_it_needs() -> None:
    completed = run("demo", before="import importlib.util as u\nfind = u.find_spec\nu.find_spec = lambda name: None")
    assert completed.returncode == 1
    assert "pip install 'interformer-kernels[bench,train]'" in completed.stderr
