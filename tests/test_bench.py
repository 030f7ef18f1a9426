"""The bench measures what it says: laws of lengths, peers that are right, medians, and a table that tells the truth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interformer_bench import peers, report, run, shapes, timing

NOWHERE = Path("nowhere")


def quantiles(lengths: tuple[int, ...], *levels: float) -> list[float]:
    return torch.tensor(lengths).double().quantile(torch.tensor(levels, dtype=torch.float64)).tolist()


@pytest.mark.parametrize(
    ("name", "wanted", "mean", "longest"),
    [
        ("movielens", (10, 70, 233, 451), 101, 736),
        ("beauty", (5, 6, 14, 43), 8.9, 204),
        ("grocery", (3, 5, 17, 54), 8.3, 202),
        ("diginetica", (1, 3, 9, 20), 4.1, 54),
    ],
)
def test_fitted_laws_have_the_quantiles_of_the_real_ones(
    name: str, wanted: tuple[int, ...], mean: float, longest: int
) -> None:
    law = shapes.laws(NOWHERE)[name]
    assert law.source == "fitted"
    lengths = law.lengths(50_000)
    assert quantiles(lengths, 0.1, 0.5, 0.9, 0.99) == pytest.approx(wanted, rel=0.08, abs=1)
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.08)
    assert max(lengths) <= longest


@pytest.mark.parametrize(
    ("name", "mean", "shortest", "longest"),
    [
        ("uniform 1..50", 25.5, 1, 50),
        ("log-normal, mean 100", 100, 1, 1000),
        ("log-normal, mean 500", 500, 1, 2048),
        ("all 1024", 1024, 1024, 1024),
        ("fill 0.1", 51.2, 0, 512),
        ("fill 0.5", 256, 0, 512),
        ("fill 1.0", 512, 512, 512),
    ],
)
def test_synthetic_laws_have_the_mean_and_bounds_of_their_names(
    name: str, mean: float, shortest: int, longest: int
) -> None:
    lengths = shapes.laws(NOWHERE)[name].lengths(50_000)
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.05)
    assert shortest <= min(lengths) <= max(lengths) <= longest


def test_real_lengths_are_taken_where_their_file_is(tmp_path: Path) -> None:
    (tmp_path / "lengths").mkdir()
    (tmp_path / "lengths/5core_beauty.json").write_text("[7, 9]")
    for place in (tmp_path, tmp_path / "lengths", tmp_path / "beside"):
        law = shapes.laws(place)["beauty"]
        assert law.source == "real"
        assert set(law.lengths(50)) == {7, 9}


def test_lengths_come_from_the_seed() -> None:
    law = shapes.laws(NOWHERE)["beauty"]
    assert law.lengths(40, seed=1) == law.lengths(40, seed=1) != law.lengths(40, seed=2)


@pytest.mark.parametrize("op", peers.OPS)
def test_every_peer_is_right_with_empty_rows_among_the_others(op: str) -> None:
    arguments = peers.inputs(op, (0, 5, 1, 33, 0), torch.float32, "cpu", queries=2)
    for name in peers.candidates(op):
        assert peers.check(op, name, arguments) is None


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        (lambda peer: lambda **arguments: peer(**arguments) * 1.001, "wrong out"),
        (lambda peer: lambda **arguments: torch.ones(2) @ torch.ones(3), "failed"),
    ],
    ids=["wrong", "raises"],
)
def test_a_wrong_peer_is_not_timed(wrong: Any, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"padded SDPA": wrong(peers.padded_pma_pooling), "per-row SDPA": peers.row_wise_pma_pooling}
    monkeypatch.setitem(peers.PEERS, "pma_pooling", table)
    shape = run.Shape("pma_pooling", shapes.laws(NOWHERE)["diginetica"], rows=8)
    measured = list(run.measure([shape], seconds=0.0))
    assert [one.runner for one in measured if one.median is None] == ["padded SDPA"] * 2
    assert [one.direction for one in measured] == [d for d in run.PASSES for _ in range(3)]
    problems = report.problems(measured)
    assert len(problems) == 1
    assert shown in problems[0]


def test_interleaved_runs_take_turns_and_report_medians() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    taken = timing.interleaved(runs, seconds=1.0, least=3, most=3)
    assert {name: time.samples for name, time in taken.items()} == {"a": 3, "b": 3}
    turns = "".join(calls[4:])  # after two calls of each before the timing
    assert turns.lstrip("a").startswith("b")
    assert "a" in turns.lstrip("a")
    assert timing.interleaved(runs, seconds=0.0)["b"].samples == 1  # slow runs are not repeated for ever
    assert timing.Timing.of([3.0, 1.0, 2.0, 100.0]) == timing.Timing(2.5, 1.75, 27.25, 4)
    assert timing.Timing.of([2.0]) == timing.Timing(2.0, 2.0, 2.0, 1)


def measurement(**changes: Any) -> run.Measurement:
    one = run.Measurement(
        op="pma_pooling",
        law="beauty",
        source="fitted",
        rows=2,
        tokens=10,
        longest=9,
        queries=2,
        heads=4,
        head_size=16,
        dtype="float32",
        device="cpu",
        direction="forward",
        runner=peers.OURS,
        backend="cpu",
        median=0.002,
        low=0.001,
        high=0.003,
        samples=3,
    )
    return replace(one, **changes)


def test_the_table_compares_with_the_best_peer_only(tmp_path: Path) -> None:
    measured = [
        measurement(),
        measurement(runner="slow", median=0.009),
        measurement(runner="fast", median=0.001),
        measurement(runner="wrong", median=None, problem="wrong out: error 1, budget 0"),
    ]
    machine = timing.Machine(gemm=2e9, copy=3e9, threads=1)
    text = report.markdown(measured, machine)
    line = "| pma_pooling | beauty (fitted) | 2 x 5 (9) | forward | 2 ms (cpu) | 1 ms (fast) | 0.50x | 100% |"
    assert line in text.splitlines()
    assert "GEMM 2 GFLOP/s, copy 3.0 GB/s" in text
    assert "pma_pooling on beauty: wrong wrong out: error 1, budget 0" in text
    report.write_json(tmp_path / "new" / "speed.json", measured, machine)
    assert len(json.loads((tmp_path / "new" / "speed.json").read_text())["measurements"]) == 4


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "speed.png", [measurement(), measurement(direction="forward+backward")])
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
