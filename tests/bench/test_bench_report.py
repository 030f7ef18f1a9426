"""The bench's report: FLOPs and bytes of a call, ratios, targets, memory, pictures."""

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
from interformer_bench import (
    calls,
    grid,
    limits,
    memory,
    peers,
    plots,
    quiet,
    ranges,
    report,
    run,
    shapes,
    targets,
    timing,
    workloads,
)
from interformer_bench.ops.table import TABLE
from interformer_bench.peers import registry
from interformer_bench.progress import Progress
from interformer_bench.result_tables import read_results
from interformer_bench.workloads import Sizes
from torch.utils.flop_counter import FlopCounterMode

from interformer_kernels._cli import parity

# ---------------------------------------------------------------- FLOPs and bytes


def test_flops_by_hand() -> None:
    lengths = (3, 0, 2)
    # 9 + 4 pairs of tokens, 2 heads of 5 channels; scores and weighted sum, two operations each; backward: 5 products.
    assert limits.flops("jagged_attention", lengths, Sizes(2, 5)) == (2 * 2 * 2 * 5 * 13, 5 * 2 * 2 * 5 * 13)
    for op in ("pma_pooling", "gated_cross_attention"):  # 5 tokens, 7 queries
        assert limits.flops(op, lengths, Sizes(2, 5, 7)) == (4 * 7 * 2 * 5 * 5, 10 * 7 * 2 * 5 * 5)
    assert limits.flops("personalized_ffn", lengths, Sizes(1, 6, width=9)) == (2 * 6 * 9 * 5, 4 * 6 * 9 * 5)
    assert limits.flops("apply_rotary", lengths, Sizes(2, 6)) == (5 * 2 * 3 * 6,) * 2  # tokens, heads, pairs, 6 a pair
    # Folded: 7 seeds of 2 heads against 5 raw tokens of 10; seeds by W_k, and 3 pooled rows by W_v.
    forward, backward = limits.flops("pma_folded", lengths, Sizes(2, 5, 7, width=10))
    assert forward == 4 * 7 * 2 * 10 * 5 + 2 * 7 * 2 * 5 * 10 + 2 * 3 * 7 * 2 * 5 * 10
    assert backward == 10 * 7 * 2 * 10 * 5 + 2 * (2 * 7 * 2 * 5 * 10 + 2 * 3 * 7 * 2 * 5 * 10)


def test_flops_are_those_of_pytorchs_own_counter_where_nothing_is_padded() -> None:
    arguments = workloads.inputs("personalized_ffn", (4, 4), Sizes(head_size=6, width=3), torch.float32)
    bmm = registry.candidates("personalized_ffn")["padded bmm"]
    forward, backward = limits.flops("personalized_ffn", (4, 4), Sizes(head_size=6, width=3))
    with FlopCounterMode(display=False) as counter:
        workloads.training("personalized_ffn", bmm.run, arguments)
    assert counter.get_total_flops() == forward + backward


@pytest.mark.parametrize("op", workloads.OPS)
def test_flops_are_those_that_the_ops_register_with_pytorch(op: str) -> None:
    """The bench has its own formulas, since it also measures other commits of the package; both must agree."""
    lengths = (5, 0, 3, 17)
    sizes = Sizes(2, 6, 3, width=12 if op in ("pma_folded", "personalized_ffn") else 0)
    arguments = workloads.inputs(op, lengths, sizes, torch.float32)
    forward, backward = limits.flops(op, lengths, sizes)
    with FlopCounterMode(display=False) as counter:
        workloads.forward(workloads.ours(op), arguments)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        workloads.training(op, workloads.ours(op), arguments)
    assert counter.get_total_flops() == forward + backward


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=str)
def test_bytes_by_hand(dtype: torch.dtype, size: int) -> None:
    lengths, sizes = (3, 0, 2), Sizes(2, 4, 7)
    tokens, out, offsets = 5 * 2 * 4 * size, 3 * 7 * 2 * 4 * size, 4 * 8

    def bytes_of(op: str, direction: str, sizes: Sizes = sizes) -> int:
        arguments = workloads.inputs(op, lengths, sizes, dtype)
        return limits.work(op, arguments, lengths, sizes, direction).bytes

    forward = 3 * tokens + offsets + tokens  # q, k, v, offsets; out
    assert bytes_of("jagged_attention", "forward") == forward
    assert bytes_of("jagged_attention", "forward+backward") == 2 * forward + 3 * tokens  # grad_out for out; dq, dk, dv
    seeds = 7 * 2 * 4 * size
    forward = seeds + 2 * tokens + offsets + out
    assert bytes_of("pma_pooling", "forward") == forward
    assert bytes_of("pma_pooling", "forward+backward") == 2 * forward + seeds + 2 * tokens
    # A residual's gradient is the output's own: it is not written.
    gated = replace(sizes, gated=True)
    forward = out + 2 * tokens + offsets + 2 * out + out  # q; k, v; offsets; gate, residual; out
    assert bytes_of("gated_cross_attention", "forward+backward", gated) == 2 * forward + out + 2 * tokens + out
    x, tables = 5 * 2 * 4 * size, 2 * 3 * 2 * 4  # cos and sin of 3 places and 2 pairs, float32 always
    assert bytes_of("apply_rotary", "forward") == 2 * x + tables + offsets
    assert bytes_of("apply_rotary", "forward+backward") == 2 * (2 * x + tables + offsets)
    wide = Sizes(head_size=6, width=9)
    forward = size * (5 * 6 + 3 * 6 * 9 + 3 * 9 + 5 * 9) + offsets
    assert bytes_of("personalized_ffn", "forward", wide) == forward


# ---------------------------------------------------------------- the table


def measurement(**changes: Any) -> run.Measurement:
    default = run.Measurement(
        op="pma_pooling",
        law="beauty",
        source="fitted",
        rows=2,
        tokens=10,
        longest=9,
        sizes="H4 D16 M2",
        kind="pooled",
        dtype="float32",
        device="cpu",
        threads=2,
        direction="forward",
        runner=peers.OURS,
        group="",
        backend="cpu",
        flops=1_000_000,
        bytes=3_000_000,
        median=0.002,
        low=0.001,
        high=0.003,
        samples=3,
    )
    return replace(default, **changes)


MACHINE = {("float32", 2): timing.Rates(gemm=2e9, copy=3e9), ("bfloat16", 2): timing.Rates(gemm=1e8, copy=3e9)}


def test_the_table_compares_with_the_best_peer_only(tmp_path: Path) -> None:
    measured = [
        measurement(best_threads=2),
        measurement(runner="slow", median=0.009),
        measurement(runner="fast", median=0.001, best_threads=1),
        measurement(runner="wrong", median=None, problem="wrong out: error 1, budget 0"),
        measurement(direction="forward+backward", median=0.008),
        measurement(direction="forward+backward", runner="fast", median=0.032),
    ]
    results = report.Report(measured, MACHINE, calls=[("a call", "2 us", "-")])
    text = report.markdown(results, ["ratios.png"])
    shape = "| beauty (fitted) | 2 x 5 (9) | H4 D16 M2 | float32 | 2 |"
    missed = ">= 0.95x: 0.50 MISS; >= 3x: 0.50 MISS"
    # 1 MFLOP at 2 GFLOP/s takes 0.5 ms, 3 MB at 3 GB/s 1 ms: copies are the nearer limit, half of it is reached.
    assert (
        f"{shape} forward | 2 ms (cpu) | 1 ms (fast) | 2, 1 | wrong | 0.50x | 0.50 copy | - | 100% of 3 | {missed} |"
        in text
    )
    passed = ">= 0.95x: 4.00 pass; >= 3x: 4.00 pass; back / forth <= 2.8: 3.00 MISS"
    assert f"{shape} forward+backward | 8 ms (cpu) | 32 ms (fast) | -, - | - | 4.00x | 0.12 copy | 3.00 |" in text
    assert passed in text
    assert "float32, 2 threads: GEMM 2 GFLOP/s (2048^3), copy 3.0 GB/s" in text
    assert "- pma_pooling: wrong wrong out: error .., budget .. (beauty, H4 D16 M2, float32, forward: 1 0)" in text
    assert "| a call | 2 us | - |" in text
    assert "![ratios.png](ratios.png)" in text
    assert len(report.missed(results)) == 3
    report.write_json(tmp_path / "new" / "speed.json", results)
    written = json.loads((tmp_path / "new" / "speed.json").read_text())
    assert len(written["measurements"]) == 6
    assert written["machine"][0] == {"dtype": "float32", "threads": 2, "gemm": 2e9, "copy": 3e9, "size": 2048}


def test_a_busy_machine_has_no_ratio_and_no_verdict_on_its_own_lines(tmp_path: Path) -> None:
    reason = "a thread got 0.50 of a processor, 0.9 is quiet"
    measured = [
        measurement(direction=d, runner=name, busy=reason if d == "forward" else None)
        for d in run.PASSES
        for name in (peers.OURS, "peer")
    ]
    checks = [quiet.Quietness(2, share, 0.0, 2e-5, 1e-5) for share in (0.99, 0.5)]
    results = report.Report(measured, MACHINE, checks=checks)
    text = report.markdown(results)
    assert text.splitlines()[0].endswith(f"{report.head(results)}")
    assert "BUSY in 1 of 2 checks" in text.splitlines()[0]
    busy, calm = (line for line in text.splitlines() if line.startswith("| beauty"))
    assert f"| {quiet.NO_RATIO} | - | - | 100% of 3 | {reason} |" in busy
    assert "| 1.00x | 0.50 copy | - |" in calm  # no share of a forward that a busy machine timed
    assert all("forward+backward" in line for line in report.missed(results))
    (tmp_path / "report.md").write_text(text)
    assert [line.direction for line in read_results(tmp_path / "report.md")] == ["forward+backward"]
    assert [line.direction for line in plots.results_of(measured, MACHINE)] == ["forward+backward"]
    assert plots.busy_note(measured) == [f"{quiet.NO_RATIO} for 1 lines"]
    assert report.plain(results)["quiet"][1]["busy"] == reason
    costs = [("a call", "2 us", "1.0x pass"), ("another", "2 us", "-")]
    assert [row[2] for row in calls.without_ratios(costs, reason)] == [quiet.NO_RATIO, "-"]


def test_targets_hold_on_two_threads_and_the_floor_on_any() -> None:
    def texts(**changes: Any) -> list[str]:
        group = {
            result.runner: result for result in (measurement(**changes), measurement(**{**changes, "runner": "peer"}))
        }
        return [judged.text for judged in report.judge(group, MACHINE, back=None)]

    assert texts() == [">= 0.95x", ">= 3x"]
    assert texts(threads=1) == [">= 0.95x"]
    assert texts(kind="full", direction="forward+backward") == [">= 0.95x", ">= 1x"]
    jagged = texts(op="jagged_attention", kind="middle rows")
    assert jagged == [">= 0.95x", ">= 2.2x", ">= 0.8 of GEMM"]
    assert texts(op="jagged_attention", kind="long rows", dtype="bfloat16")[1:] == [">= 2.2x", ">= 0.7 of GEMM"]
    assert texts(median=None) == []


def test_groups_of_peers_have_targets_of_their_own() -> None:
    group = {
        result.runner: result
        for result in (
            measurement(op="pma_folded", kind="folded", median=1.0),
            measurement(op="pma_folded", kind="folded", runner="a", group="that projects", median=9.0),
            measurement(op="pma_folded", kind="folded", runner="b", group="that folds", median=4.0),
            measurement(op="pma_folded", kind="folded", runner="c", group="that folds", median=4.4),
        )
    }
    assert [str(judged) for judged in report.judge(group, MACHINE, back=None)] == [
        ">= 0.95x: 4.00 pass",
        ">= 8x that projects: 9.00 pass",
        ">= 4.5x that folds: 4.00 MISS",
    ]


def test_a_slow_product_of_16_bit_numbers_is_no_limit() -> None:
    limit = report.of_limit(measurement(dtype="bfloat16", bytes=0), MACHINE)
    assert limit == ("GEMM", pytest.approx(0.25))  # at float32's rate, 20 times bfloat16's
    assert report.of_gemm(measurement(dtype="bfloat16"), MACHINE) == pytest.approx(5.0)


def test_busy_cores_are_told() -> None:
    single, double = (timing.Rates(gemm, copy=1e9) for gemm in (1e9, 1.9e9))
    assert "BUSY" not in report.rates({("float32", 1): single, ("float32", 2): double})
    text = report.rates({("float32", 1): single, ("float32", 2): replace(double, gemm=0.9e9)})
    assert "THE CORES WERE BUSY: 2 threads multiplied float32 at 0.9 times the rate of one" in text


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measured = [measurement(direction=d, runner=name) for d in run.PASSES for name in (peers.OURS, "peer")]
    results = plots.results_of(measured, MACHINE)
    cells = [parity.Result("pma_pooling", "cpu", "float32", "cpu", "a case", "out", problem="raised")]
    plots.speed(tmp_path / "speed.png", results, cells)
    plots.speed(tmp_path / "nothing.png", [])
    for name in ("speed", "nothing"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_bar_has_both_passes_of_a_shape() -> None:
    measured = [
        measurement(direction=d, runner=name, median=median)
        for d, our_seconds in zip(run.PASSES, (1.0, 2.0), strict=True)
        for name, median in ((peers.OURS, our_seconds), ("peer", 6.0), ("slower", 9.0))
    ]
    (bars,) = plots.bars_by_op(plots.results_of(measured, MACHINE)).values()
    (bar,) = bars
    assert bar.forward is not None
    assert bar.shown is bar.training is not None
    assert (bar.forward.ratio, bar.training.ratio, bar.training.peer) == (6.0, 3.0, "peer")


def test_a_written_table_is_read_back(tmp_path: Path) -> None:
    measured = [measurement(direction=d, runner=name) for d in run.PASSES for name in (peers.OURS, "peer")]
    results = report.Report(measured, MACHINE)
    file = tmp_path / "report.md"
    file.write_text(report.markdown(results))
    read, drawn = read_results(file), plots.results_of(measured, MACHINE)
    assert [replace(line, share=0) for line in read] == [replace(line, share=0) for line in drawn]
    assert [line.share for line in read] == pytest.approx([line.share for line in drawn], abs=0.005)
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="wanted a table of results"):
        read_results(file)


def test_two_runs_are_one_table_with_the_range_of_their_ratios(tmp_path: Path) -> None:
    def run_of(name: str, *cases: tuple[str, float, str]) -> Path:
        measured = [
            measurement(direction=direction, runner=runner, median=median, busy=busy)
            for direction, seconds, busy in cases
            for runner, median in ((peers.OURS, 1.0), ("peer", seconds))
        ]
        (tmp_path / name).write_text(report.markdown(report.Report(measured, MACHINE)))
        return tmp_path / name

    forward, training = run.PASSES
    first = run_of("first.md", (forward, 3.0, ""), (training, 5.0, ""))
    second = run_of("second.md", (forward, 2.0, ""), (training, 4.5, ""))
    busy = run_of("busy.md", (forward, 9.0, "others"), (training, 9.0, "others"))
    ranges.main([str(first), str(second), str(busy), "--out", str(tmp_path / "both.md")])
    lines = read_results(tmp_path / "both.md")
    assert [(line.ratio, line.ratio_text) for line in lines] == [(2.0, "2.00 to 3.00x"), (4.5, "4.50x")]
    assert "forward: 2 of 3" in (tmp_path / "both.md").read_text()


def test_a_line_measured_again_takes_the_place_of_the_first() -> None:
    results = read_results(Path(__file__).parents[2] / "bench/results/cpu-avx2-zen4.md")
    assert list(dict.fromkeys(line.op for line in results))[:2] == ["jagged_attention", "pma_pooling"]
    (pooling,) = plots.bars_by_op(results, lengths=["all 1024"])["pma_pooling"]
    assert pooling.training is not None
    assert (pooling.training.ratio, pooling.training.peer) == (2.63, "per-row SDPA")


# ---------------------------------------------------------------- memory, calls


needs_linux = pytest.mark.skipif(memory.unsupported_reason() is not None, reason=str(memory.unsupported_reason()))


@needs_linux
def test_a_peak_is_seen_though_it_is_gone_in_the_end() -> None:
    """In a process of its own, as it is measured: here 96 MiB may hide in memory that earlier tests have freed."""
    program = """
import torch
from interformer_bench import memory

def run():
    torch.ones(24 * 2**20).sum()
    return torch.ones(8)

print(*memory.growth(run))
"""
    environment = {**os.environ, **memory.ENVIRONMENT}
    command = [sys.executable, "-c", program]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    grown, result = completed.stdout.split(maxsplit=1)
    assert 0.95 < int(grown) / (96 * 2**20) < 1.3
    assert result.startswith("tensor([1., 1.")


@needs_linux
def test_peaks_come_from_children_and_padding_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    yardstick_alone = replace(TABLE["pma_pooling"], memory_peers=("padded SDPA",))
    monkeypatch.setitem(TABLE, "pma_pooling", yardstick_alone)
    shape = grid.Shape("pma_pooling", shapes.length_distributions()["fill 0.1"], 64, Sizes(4, 32, 4), memory=True)
    unmarked = replace(shape, memory=False)
    peaks = list(memory.peaks([shape, unmarked], None, threads=1, progress=Progress()))
    assert [peak.problem for peak in peaks] == [None] * 4
    extra_bytes = {(peak.runner, peak.direction): peak.extra or 0 for peak in peaks}
    # Keys and values: 64 rows of up to 512 places, 128 numbers of 4 bytes; a tenth of the places is taken.
    padded = 2 * 64 * max(shape.lengths()) * 128 * 4
    # Linux counts pages for each processor, and adds them up when there are dozens: the sums lag a little.
    assert 0.95 * padded < extra_bytes["padded SDPA", "forward"] < 3 * padded
    assert padded < extra_bytes["padded SDPA", "forward+backward"] < 8 * padded
    assert all(extra_bytes[peers.OURS, direction] < 0.5 * padded for direction in run.PASSES)
    table = report.memory_table(peaks)
    assert all(line[6].endswith((" pass", " MISS")) for line in table[:2])
    assert [line[6] for line in table[2:]] == ["100%"] * 2


def test_a_child_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    died = subprocess.CompletedProcess([], returncode=1, stdout="", stderr="Traceback\nMemoryError: too much\n")
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: died)
    shape = grid.Shape("personalized_ffn", shapes.length_distributions()["diginetica"], 2, memory=True)
    peaks = list(memory.peaks([shape], None, threads=1, progress=Progress()))
    assert [(peak.extra, peak.problem) for peak in peaks] == [(None, "MemoryError: too much")] * 6


def test_memory_is_judged_by_its_share_of_padding() -> None:
    def peak(runner: str, extra: int | None) -> memory.Peak:
        problem = None if extra is not None else "killed"
        return memory.Peak("pma_pooling", "fill 0.1", "H4", "forward", runner, extra, problem)

    mebi = 2**20
    peaks = [peak(peers.OURS, mebi), peak("padded SDPA", 20 * mebi), peak("index-add", None)]
    assert [line[5:] for line in report.memory_table(peaks)] == [
        ("1.00 MiB", "5% pass"),
        ("20.00 MiB", "100%"),
        ("killed", "-"),
    ]
    worse = [peak(peers.OURS, 3 * mebi), *peaks[1:]]
    assert report.memory_table(worse)[0][6] == "15% MISS"


def test_the_cost_of_a_call_is_told_for_every_way() -> None:
    lines = calls.lines(seconds=0.01)
    assert len(lines) >= len(calls.OPS) * len(calls.RUNNERS)
    assert all(" us" in line[1] for line in lines)
    judged = [line[2] for line in lines if line[2] != "-"]
    assert len(judged) >= len(calls.OPS)
    assert all(target.endswith(("pass", "MISS")) for target in judged)


def test_every_target_has_a_kind_and_a_pass() -> None:
    for kind in targets.KINDS:
        target = targets.target(kind, "float32")
        assert bool(target.forward) == bool(target.training) == (kind != "none")
    assert targets.target("short rows", "float64") == targets.Target()
