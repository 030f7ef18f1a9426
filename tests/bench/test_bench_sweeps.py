"""Time against length, batch and fill: the shapes and runners of a sweep, its tables and its pictures."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from interformer_bench import command, curves, peers, report, run, shapes, sweeps, timing
from interformer_bench.__main__ import main
from interformer_bench.peers import registry
from interformer_bench.run import Measurement
from interformer_bench.sweeps import SWEEPS, Sweep

PNG = b"\x89PNG"


def lengths_of(axis: str) -> list[tuple[int, ...]]:
    return [shape.lengths() for shape in SWEEPS[axis].shapes]


def test_lengths_differ_and_tokens_do_not() -> None:
    batches = lengths_of("length")
    assert [set(lengths) for lengths in batches] == [{8 << i} for i in range(9)]
    assert {sum(lengths) for lengths in batches} == {16384}


def test_batches_differ_and_lengths_do_not() -> None:
    batches = lengths_of("batch")
    assert [len(lengths) for lengths in batches] == [1, 4, 16, 64, 256, 1024, 4096]
    assert {length for lengths in batches for length in lengths} == {50}


def test_fills_differ_and_the_padded_batch_hardly_does() -> None:
    batches = lengths_of("fill")
    fills = [sum(lengths) / (len(lengths) * max(lengths)) for lengths in batches]
    assert fills == pytest.approx([0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0], rel=0.1)
    assert all(500 <= max(lengths) <= 512 for lengths in batches)


@pytest.mark.parametrize("axis", SWEEPS)
def test_a_sweep_is_one_op_on_one_size_beside_known_peers(axis: str) -> None:
    sweep = SWEEPS[axis]
    assert {(shape.op, shape.sizes) for shape in sweep.shapes} == {(sweep.op, sweep.shapes[0].sizes)}
    assert set(sweep.peers) <= set(registry.candidates(sweep.op))
    assert len(set(sweep.peers)) >= 2


# ---------------------------------------------------------------- measured, on small batches


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """The sweep over batches, two shapes of it, as the only one."""
    sweep = replace(SWEEPS["batch"], shapes=SWEEPS["batch"].shapes[:2], peers=("padded SDPA", "index-add"))
    for axis in [axis for axis in SWEEPS if axis != "batch"]:
        monkeypatch.delitem(SWEEPS, axis)
    monkeypatch.setitem(SWEEPS, "batch", sweep)
    return sweep


def test_a_sweep_is_measured_in_float32_on_the_most_threads_with_its_peers_alone(small: Sweep) -> None:
    settings = run.Settings(("bfloat16",), threads=(1, 2), seconds=0.0, compiled=False)
    measured = list(sweeps.measure(small, settings))
    assert {(measurement.dtype, measurement.threads) for measurement in measured} == {("float32", 2)}
    assert list(dict.fromkeys(measurement.runner for measurement in measured)) == [
        peers.OURS,
        "padded SDPA",
        "index-add",
    ]
    assert [small.at(measurement) for measurement in measured if measurement.runner == peers.OURS] == [1, 1, 4, 4]


def planted(small: Sweep, **changes: Any) -> list[Measurement]:
    """A measurement for each runner, pass and shape: ours takes a millisecond a row, the others two and three."""
    names = {peers.OURS: 1, "padded SDPA": 2, "index-add": 3}
    measured = []
    for shape, direction, (name, slowdown) in itertools.product(small.shapes, run.PASSES, names.items()):
        seconds = shape.rows * slowdown * 1e-3
        description = (
            shape.distribution.name,
            "synthetic",
            shape.rows,
            50 * shape.rows,
            50,
            str(shape.sizes),
            "none",
            "float32",
        )
        measurement = Measurement(
            shape.op, *description, "cpu", 2, direction, name, "", "cpu", 10**6, 10**6, seconds, seconds, seconds, 9
        )
        measured.append(replace(measurement, **changes) if name == "index-add" else measurement)
    return measured


def test_the_table_has_everybody_and_the_ratio_to_the_best(small: Sweep) -> None:
    columns, lines = report.sweep_table(small, planted(small, median=None, problem="failed: X: y"))
    assert columns == ("pass", "rows", peers.OURS, "padded SDPA", "index-add", "ratio")
    assert lines[:2] == [
        ("forward", "1", "1 ms", "2 ms", "-", "2.00x"),
        ("forward", "4", "4 ms", "8 ms", "-", "2.00x"),
    ]
    results = report.Report([], {}, sweeps={"batch": planted(small, median=None, problem="failed: X: y")})
    text = report.markdown(results, ["batch.png"])
    assert (
        "## Time against batch\n\npma_pooling against batch: H4 D32 M2, 50 tokens a row, float32\n\n| pass | rows |"
        in text
    )
    assert "- pma_pooling: index-add failed: X: y (all 50, H4 D32 M2, float32, forward; " in text


def test_sweeps_alone_as_a_command(small: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    chosen = ["--sweeps", "--seconds", "0", "--threads", "1", "--no-compile"]
    assert main([*chosen, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert small.title() in printed.out
    assert "against batch 2/2: pma_pooling, float32: 4 rows" in printed.err
    assert (out / "batch.png").read_bytes().startswith(PNG)
    assert "![batch.png](batch.png)" in (out / "report.md").read_text()
    written = json.loads((out / "report.json").read_text())
    assert written["measurements"] == []
    assert {line["rows"] for line in written["sweeps"]["batch"]} == {1, 4}
    assert main([*chosen, "--op", "personalized_ffn"]) == 0  # an op that is not swept
    assert small.title() not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "swept"),
    [([], True), (["--quick"], False), (["--law", "movielens"], False), (["--rows", "3"], False)],
    ids=str,
)
def test_sweeps_belong_to_a_whole_run(
    options: list[str], swept: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nothing(*arguments: Any) -> Iterator[Any]:
        return iter(())

    swept_axes: list[str] = []
    monkeypatch.setattr(run, "measure", nothing)
    monkeypatch.setattr(command.memory, "peaks", nothing)
    monkeypatch.setattr(command.calls, "lines", list)
    monkeypatch.setattr(sweeps, "measure", lambda sweep, settings, watch: swept_axes.append(sweep.axis) or nothing())
    assert main(["--op", "pma_pooling", *options, "--json", str(tmp_path / "bench.json")]) == 0
    assert swept_axes == (["batch"] if swept else [])


# ---------------------------------------------------------------- pictures


def test_a_curve_names_who_was_not_timed(small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr(curves.plots, "save", lambda path, figure: figures.append(figure))
    curves.sweep(tmp_path / "batch.png", small, planted(small, median=None, problem="failed: X: y"))
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == [peers.OURS, "padded SDPA", "index-add (not timed at 2 of 2)"]
    forward = figures[0].axes[0]
    assert (forward.get_xlabel(), forward.get_ylabel()) == ("rows", "time of a call, ms")
    assert list(forward.lines[0].get_xdata()) == [1, 4]
    assert list(forward.lines[0].get_ydata()) == pytest.approx([1.0, 4.0])


def test_the_roofline_has_the_ceilings_of_the_run(
    small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    machine = {("float32", 2): timing.Rates(gemm=8e9, copy=2e9)}
    curves.roofline(tmp_path / "made" / "roofline.png", planted(small), machine)
    assert (tmp_path / "made" / "roofline.png").read_bytes().startswith(PNG)
    figures: list[Any] = []
    monkeypatch.setattr(curves.plots, "save", lambda path, figure: figures.append(figure))
    curves.roofline(tmp_path / "roofline.png", planted(small), machine)
    forward = figures[0].axes[0]
    (ceiling,) = forward.lines
    # Points at 1 FLOP a byte; the ridge at 4, from where on products are the limit.
    assert list(ceiling.get_xdata()) == [0.5, 4.0, 8.0]
    assert list(ceiling.get_ydata()) == [1.0, 8.0, 8.0]
    assert forward.collections[0].get_offsets().tolist() == [[1.0, 1.0], [1.0, 0.25]]
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["float32: products 8 GFLOP/s, copies 2 GB/s", "pma_pooling"]


def test_laws_of_one_length_and_of_a_fill_have_their_names() -> None:
    assert shapes.equal(7).name == "all 7"
    assert set(shapes.equal(7).lengths(5)) == {7}
    assert shapes.filled(0.35).name == "fill 0.35"
