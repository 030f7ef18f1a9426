"""The report of a GPU machine ends in time, with all results in it, whatever its steps do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_tools import ROOT, command, guard, planted, results, run, table

Report, Stage, Step = run.Report, run.Stage, run.Step


def report_on(folder: Path, seconds: float = 120.0) -> Any:
    """A report that prints nothing."""
    return Report(folder, seconds, show=lambda line: None)


def stages_of(file: Path, names: Sequence[str], workers: int = 1) -> list[Any]:
    return [Stage([planted.step(name, file) for name in names], 120.0, workers)]


def left_over(folder: Path) -> set[int]:
    """Processes that a report in this folder has started and that still run."""
    return set(guard.marked(f"{folder.resolve()}//"))


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# ---------------------------------------------------------------- steps that go wrong


@pytest.mark.parametrize("workers", [1, 4])
def test_every_step_gets_its_status_and_nothing_stays(tmp_path: Path, workers: int) -> None:
    report = report_on(tmp_path)
    with report.opened():
        report.run(stages_of(report.file, [*planted.PROGRAMS], workers))
        assert not left_over(tmp_path)
    records, damaged = results.read(report.file)
    tries = results.tries(records)
    for name, (_, status) in planted.PROGRAMS.items():
        attempt = tries[f"planted-{name}"]
        assert attempt.status == status, (name, attempt)
        assert len(attempt.records) == (name not in ("no-memory", "finds-nothing", "ignores")), (name, attempt)
    assert {name: attempt.left_behind for name, attempt in tries.items() if attempt.left_behind} == {
        "planted-leaves": 2
    }
    assert tries["planted-fails"].last == ["why it failed"]
    assert "MemoryError" in tries["planted-no-memory"].last[-1]
    # Nine records that lie, three lines of nonsense, and two halves of lines in which the next writer went on: of
    # steps side by side one half may go on in the other.
    assert damaged in ((14,) if workers == 1 else (13, 14))
    assert "bytes left out" in (tmp_path / run.LOG).read_text()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1 << 20  # one of the steps printed 130 MB
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.jsonl", "steps.log"]


def test_what_cannot_be_started_is_said(tmp_path: Path) -> None:
    report = report_on(tmp_path)
    steps = [Step("none", ("/no/such/program",), 10.0), Step("tool", ("true",), 10.0, missing="it is not installed")]
    with report.opened():
        report.run([Stage(steps, 10.0)])
    tries = report.tries()
    assert tries["none"].status.startswith("failed: cannot be started: ")
    assert tries["tool"].status == "missing: it is not installed"


def test_the_whole_report_has_a_limit_and_steps_leave_time_for_what_follows(tmp_path: Path) -> None:
    report = report_on(tmp_path, seconds=500.0)
    slow = Step("slow", ("sleep", "600"), 600.0, finds=False)
    with report.opened():
        report.run([Stage([slow, planted.step("fails", report.file)], 600.0, leave=0.99)])
        assert report.end - time.monotonic() > 400
        report.end = time.monotonic() + 10
        report.run([Stage([planted.step("good", report.file), slow, planted.step("crashes", report.file)], 600.0)])
    statuses = {name: attempt.status for name, attempt in report.tries().items()}
    late = "not started: out of time"
    assert statuses == {"slow": "out of time", "planted-fails": late, "planted-good": "ok", "planted-crashes": late}


def test_a_resumed_report_does_what_is_not_done_well(tmp_path: Path) -> None:
    names = ["good", "fails", "leaves", "finds-nothing"]
    for _ in range(2):
        report = report_on(tmp_path)
        with report.opened():
            report.run(stages_of(report.file, names))
    begun = [record["step"] for record in results.read(report.file)[0] if record["kind"] == "begin"]
    assert [begun.count(f"planted-{name}") for name in names] == [1, 2, 1, 2]
    with report.opened():
        report.run(stages_of(report.file, ["good"]), again=True)
    assert len(report.tries()["planted-good"].records) == 1  # the records of the last try alone


# ---------------------------------------------------------------- the end of the report itself


# A shell's background job ignores SIGINT, and so does what it starts.
_REPORT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from gpu import planted
from gpu.run import Report, Stage, Stopped
report = Report(Path(sys.argv[1]), 120.0)
try:
    with report.opened():
        report.run([Stage([planted.step(name, report.file, 100.0) for name in ("good", "hangs")], 100.0)])
except Stopped as stopped:
    raise SystemExit(128 + stopped.number)
"""


def begun(folder: Path) -> subprocess.Popen[bytes]:
    """A report in a process, whose step hangs with grandchildren that do not end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    process = subprocess.Popen([sys.executable, "-c", _REPORT, str(folder)], env=environment)
    wait_for(lambda: len(left_over(folder)) == 3)
    return process


def test_ignored_signals_stay_ignored_and_children_are_waited_for(tmp_path: Path) -> None:
    """As under `nohup`, and under a parent that ignores the end of its children."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGCHLD)}
    try:
        report = report_on(tmp_path)
        with report.opened():
            os.kill(os.getpid(), signal.SIGHUP)
            report.run(stages_of(report.file, ["fails"]))
        assert report.tries()["planted-fails"].status == "failed: exit status 1"
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_report_that_is_ended_leaves_nothing_running(tmp_path: Path, number: int) -> None:
    process = begun(tmp_path)
    process.send_signal(number)
    assert process.wait(30) == (-number if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not left_over(tmp_path))
    with open(tmp_path / results.FILE, "ab") as file:
        file.write(b'{"kind": "planted", "step": "cut o')
    report = report_on(tmp_path)
    with report.opened():
        assert report.tries()["planted-hangs"].status == "cut off"
        report.run(stages_of(report.file, ["good", "hangs", "fails"]))
    records, damaged = results.read(report.file)
    assert damaged == 1
    tries = results.tries(records)
    assert {name: attempt.status for name, attempt in tries.items()} == {
        "planted-good": "ok", "planted-hangs": "out of time", "planted-fails": "failed: exit status 1"
    }  # fmt: skip
    assert [record["step"] for record in records if record["kind"] == "begin"].count("planted-good") == 1


def test_two_reports_do_not_share_a_folder(tmp_path: Path) -> None:
    second_report = report_on(tmp_path).opened()
    with report_on(tmp_path).opened(), pytest.raises(run.BusyError, match="another report writes there"):
        second_report.__enter__()


def test_a_full_disk_ends_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.files, "append_line", full)
    printed: list[str] = []
    report = Report(tmp_path, 60.0, show=printed.append)
    with report.opened():
        report.run([Stage([Step("one", ("true",), 10.0, finds=False)], 10.0)])
    assert [line[:11] for line in printed] == ["NOT WRITTEN", "NOT WRITTEN", "[    0 s] o"]


# ---------------------------------------------------------------- reading results


def test_records_are_of_the_try_that_counts(tmp_path: Path) -> None:
    def lines(step: str, status: str | None, *values: int) -> list[dict[str, Any]]:
        begin = [{"kind": "begin", "step": step, "records": ["job"], "backend": "cuda"}]
        of_this_backend = [{"kind": "check", "step": "job", "backend": "cuda", "value": value} for value in values]
        of_other_backend = [{"kind": "check", "step": "job", "backend": "triton", "value": -1}]
        end = [{"kind": "step", "step": step, "status": status, "seconds": 1.0, "last": []}] if status else []
        return [*begin, *of_this_backend, *of_other_backend, *end]

    def counted(*tries: list[dict[str, Any]]) -> tuple[str, list[int]]:
        attempt = results.tries([record for lines_of_try in tries for record in lines_of_try])["checks-cuda"]
        return attempt.status, [record["value"] for record in attempt.records]

    cut, failed, succeeded = (lines("checks-cuda", *outcome) for outcome in ((None, 1, 2), ("failed: x", 3), ("ok", 4)))
    assert counted(cut) == ("cut off", [1, 2])
    assert counted(cut, failed) == ("cut off", [1, 2])  # the try with more records
    assert counted(failed, cut) == ("cut off", [1, 2])
    assert counted(cut, succeeded, failed) == ("ok", [4])
    late = [{"kind": "step", "step": "checks-cuda", "status": "not started: out of time"}]
    assert counted(failed, late) == ("failed: x", [3])
    new_report = [{"kind": "report", "step": "report"}]
    assert counted(cut, new_report, succeeded)[0] == "ok"


@pytest.mark.parametrize(
    ("content", "values", "damaged"),
    [
        (b"", [], 0),
        (b'{"kind": "a", "value": 1}\n\n{"kind": "a", "value": 2}', [1, 2], 0),
        (b'{"kind": "a", "val{"kind": "a", "value": 2}\n', [2], 1),
        (b'no\n{"value": 3}\n[]\nnull\n{"kind": 3}\n"kind"\n', [], 6),
        (b"\xff\x00" * 1000 + b'\n{"kind": "a", "value": 1}\n', [1], 1),
        (b"[" * 100_000 + b'\n{"kind": "a", "value": 1}\n', [1], 1),
        (b'{"' * 2_000_000 + b'\n{"kind": "a", "value": 1}\n', [1], 1),
    ],
)
def test_damaged_results_are_read(tmp_path: Path, content: bytes, values: list[int], damaged: int) -> None:
    file = tmp_path / results.FILE
    file.write_bytes(content)
    records, damaged_lines = results.read(file)
    assert ([record["value"] for record in records], damaged_lines) == (values, damaged)
    results.mend(file)
    results.files.append_line(file, {"kind": "a", "value": 9})
    assert [record["value"] for record in results.read(file)[0]] == [*values, 9]


def test_no_results_are_none(tmp_path: Path) -> None:
    assert results.read(tmp_path / "none") == ([], 0)
    results.mend(tmp_path / "none")


# ---------------------------------------------------------------- the table


def test_nonsense_is_no_record(tmp_path: Path) -> None:
    file = tmp_path / results.FILE
    sane = [{"kind": "ceiling", "dtype": "float32", "gemm": 1, "copy": 2.5}, {"kind": "new", "what": []}]
    nonsense = [
        {"kind": "ceiling", "dtype": "float32", "gemm": "1", "copy": 2},
        {"kind": "bench", "step": "x"},
        {"step": "x"},
    ]
    nonsense += [{"kind": "step", "step": "x", "status": "ok", "seconds": None, "last": 3}, {"kind": []}]
    for record in (*sane, *nonsense):
        results.files.append_line(file, record)
    records, damaged = results.read(file)
    assert (records, damaged) == (sane, len(nonsense))
    assert "5 lines of the results are damaged" in table.printed(results.tries(records), damaged)


def record(kind: str, step: str, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, "backend": "triton", **fields}


def parity(share: float | None, case: str = "plain", **fields: Any) -> dict[str, Any]:
    description = {"op": "pma_pooling", "dtype": "bfloat16", "device": "cuda", "case": case, "quantity": "out"}
    ok = share is not None and share <= 1
    return record("parity", "parity-1", **description, share=share, ok=ok, problem=None, **fields)


def bench(runner: str, median: float, graph: float | None, **fields: Any) -> dict[str, Any]:
    description = {"op": "pma_pooling", "pass": "forward", "dtype": "bfloat16", "runner": runner, "wanted": 3.0}
    return {**record("bench", "pma-104", **description, median=median, graph=graph, problem=None), **fields}


def tried(*records: dict[str, Any], status: str = "ok", step: str = "parity-1") -> dict[str, Any]:
    return {step: results.Try(step, status, 2.0, ["a reason"], 0, list(records))}


def test_failures_come_first() -> None:
    machine = record("machine", "machine", gpu="NVIDIA H200", torch="2.11.0", triton="3.6.0")
    tries = tried(machine, step="machine") | tried(parity(0.5), parity(7.25, "tile edges"), parity(None, "one"))
    tries |= tried(record("check", "large-batch.x", ok=False, problem="row 3 differs", what="alone"), step="check")
    tries |= tried(status="failed: killed by SIGSEGV", step="smoke-cuda")
    tries |= tried(status="missing: ncu is not installed", step="ncu-cuda")
    shown = table.printed(tries, damaged=2).splitlines()
    assert shown[0].startswith("NVIDIA H200: torch 2.11.0, triton 3.6.0, ")
    assert shown[1:8] == [
        "== FAILED",
        "PARITY triton pma_pooling bfloat16 one out:",
        "PARITY triton pma_pooling bfloat16 tile edges out: 7.25 times the budget",
        "large-batch.x triton alone: row 3 differs",
        "smoke-cuda: failed: killed by SIGSEGV | a reason",
        "2 lines of the results are damaged and left out",
        "== NOT DONE",
    ]
    assert shown[8] == "missing: ncu is not installed: ncu-cuda"
    assert "triton    pma_pooling            bfloat16 3, 2, 7.25" in shown


def test_ratios_are_to_the_fastest_right_peer_and_of_the_last_record() -> None:
    ours = [bench("interformer", 9.0, None), bench("interformer", 1e-3, 2e-4)]
    peers = [bench("quick", 1e-4, 1e-5, backend="torch", problem="wrong"), bench("a", 3e-3, None, backend="torch"),
             bench("b", 4e-3, 5e-4, backend="torch")]  # fmt: skip
    (line,) = table.bench([*ours, *peers])
    assert line.split("triton")[1].strip() == "1 ms, 200 us; eager a 3 ms 3.00x (wanted 3); graph b 500 us 2.50x"
    (alone,) = table.bench(ours)
    assert alone.endswith("no peer")


def test_the_table_is_bounded() -> None:
    wrong = [parity(float(i), f"case {i} " + "x" * 400) for i in range(2, 500)]
    tries = tried(*wrong) | {f"step {i}": results.Try(f"step {i}", "ok", 1.0) for i in range(2000)}
    shown = table.printed(tries)
    assert len(shown) < 11_200
    assert shown.count("PARITY") == 10
    assert "... and 488 more of this kind" in shown
    assert shown.endswith("cut off; the whole is in results.jsonl")


# ---------------------------------------------------------------- the command


def called(*arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/gpu_report.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=seconds
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_it_says_that_it_needs_a_gpu(tmp_path: Path) -> None:
    for _ in range(2):  # results of the first run do not hinder the second
        completed = called("--out", str(tmp_path))
        assert completed.returncode == 1
        assert completed.stderr == "make gpu-report: needs a GPU that torch can use, found none\n"


def test_a_machine_without_torch_is_one_line(tmp_path: Path) -> None:
    command_line = [sys.executable, "-S", "tools/gpu_report.py", "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    environment["PYTHONPATH"] = str(tmp_path)
    completed = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert completed.returncode == 1
    assert completed.stderr == "make gpu-report: cannot look at this machine: ImportError: no torch here\n"


def test_results_are_not_lost_by_a_second_report(tmp_path: Path) -> None:
    results.files.append_line(tmp_path / results.FILE, record("smoke", "smoke-cuda", ok=True))
    completed = called("--out", str(tmp_path))
    assert completed.returncode == 2
    assert completed.stderr == f"make gpu-report: {tmp_path} holds results: --resume goes on from them, " \
        "--out DIR begins elsewhere\n"  # fmt: skip


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--seconds", "nan"], ["--part", "3"], ["--what"]])
def test_wrong_arguments_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert "usage: make gpu-report" in capsys.readouterr().err


def test_a_table_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--table", str(tmp_path), "--into", str(tmp_path)]) == 2
    assert "wanted results, found none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    results.files.append_line(tmp_path / results.FILE, record("smoke", "smoke-cuda", ok=True))
    target = str(tmp_path / "file" / "x")
    for arguments in (["--out", target], ["--table", str(tmp_path), "--into", target]):
        assert command.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("make gpu-report: [Errno 20] Not a directory: ")


def test_the_files_have_the_worst_of_parity_and_every_breach(tmp_path: Path) -> None:
    records = [parity(0.25), parity(0.5, "tile edges"), parity(2.0, "one"), parity(3.0, "two")]
    tries = tried(*records)
    written = json.loads(command._json(tries, tries["parity-1"].records))
    assert [record["share"] for record in written["records"]] == [0.5, 2.0, 3.0]
    assert written["steps"] == [{"step": "parity-1", "status": "ok", "seconds": 2.0, "last": ["a reason"]}]
