"""The bench's progress display: plain lines in a log, bars on a terminal, and every failure in both."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from interformer_bench import grid, peers, progress, run, shapes
from interformer_bench.__main__ import main
from interformer_bench.peers import registry


class RecordedProgress(progress.Progress):
    """Records all of its calls."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def begin(self, stage: str, steps: int) -> None:
        self.events.append(("begin", f"{stage} {steps}"))

    def step(self, text: str) -> None:
        self.events.append(("step", text))

    def doing(self, text: str) -> None:
        self.events.append(("doing", text))


@pytest.fixture
def few_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooling has one right peer and one that fails."""
    candidates = registry.candidates("pma_pooling", compile_too=False)
    broken = peers.Peer(lambda **arguments: 1 / 0)
    chosen = {name: candidates[name] for name in (peers.OURS, "padded SDPA")} | {"broken peer": broken}
    monkeypatch.setattr(run, "candidates", lambda *_: chosen)


@pytest.mark.usefixtures("few_peers")
def test_a_run_says_which_shape_is_checked_and_timed() -> None:
    recorded = RecordedProgress()
    shape = grid.Shape("pma_pooling", shapes.length_distributions("nowhere")["diginetica"], rows=8)
    list(run.measure([shape, shape], run.Settings(threads=(1,), seconds=0.0, progress=recorded)))
    assert recorded.events[0] == ("begin", "speed 2")
    assert [text for kind, text in recorded.events if kind == "step"] == [
        "pma_pooling, float32: 8 rows, diginetica (fitted), H1 D16 M1"
    ] * 2
    details = [text for kind, text in recorded.events if kind == "doing"]
    assert details[:3] == [f"checking {name}" for name in (peers.OURS, "padded SDPA", "broken peer")]
    assert "timing forward, 1 threads: interformer, padded SDPA" in details


@pytest.mark.usefixtures("few_peers")
def test_what_fails_is_in_the_log_the_table_and_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "bench.md"
    chosen = ["--op", "pma_pooling", "--law", "movielens", "--rows", "4", "--seconds", "0", "--threads", "1", "--quick"]
    assert main([*chosen, "--markdown", str(report)]) == 0
    printed = capsys.readouterr()
    failure = "pma_pooling: broken peer failed: ZeroDivisionError: division by zero"
    for text in (printed.out, report.read_text()):
        assert failure in text
        line = next(line for line in text.splitlines() if line.lstrip("| ").startswith("movielens"))
        assert "broken peer" in line
    assert "speed 1/1: pma_pooling, float32: 4 rows, movielens" in printed.err
    assert "checking" not in printed.err  # details are for terminals


def test_plain_lines_count_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert not sys.stderr.isatty()
    with progress.shown() as shown:
        shown.begin("memory", 2)
        shown.step("one")
        shown.step("two")
        shown.say("careful")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("] ")[2] for line in lines] == ["memory 1/2: one", "memory 2/2: two", "careful"]


def test_bars_show_the_stage_the_step_and_what_is_timed() -> None:
    rich = pytest.importorskip("rich.console")
    file = io.StringIO()
    console: Any = rich.Console(file=file, force_terminal=True, width=80, color_system=None)
    with progress.Bars(console) as bars:
        bars.begin("speed", 3)
        bars.step("the first shape")
        bars.doing("timing forward")
        bars.step("the second shape [with brackets]")
        bars.say("stopped [here]")
    drawn = file.getvalue()
    for text in ("speed", "0/3", "1/3", "the first shape", "timing forward", "[with brackets]", "stopped [here]"):
        assert text in drawn


def test_a_terminal_gets_bars_where_rich_is_and_one_line_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.shown() as shown:
        assert isinstance(shown, progress.Bars)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    with progress.shown() as shown:
        assert type(shown) is progress.OneLine
