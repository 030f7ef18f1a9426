"""The parts of the bench: distributions of lengths, the grid of shapes, peers that are right, medians."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interformer_bench import checks, grid, peers, quiet, report, run, shapes, targets, threads, timing, workloads
from interformer_bench.__main__ import main
from interformer_bench.ops.table import TABLE
from interformer_bench.peers import buckets, compiled, fbgemm, registry
from interformer_bench.workloads import Sizes

NOWHERE = Path("nowhere")
LAWS = (
    *("movielens", "beauty", "grocery", "diginetica", "uniform 1..50", "log-normal, mean 100", "log-normal, mean 500"),
    *("all 1024", "all 104", "fill 0.1", "fill 0.5", "fill 1.0"),
)


def quantiles(lengths: tuple[int, ...], *levels: float) -> list[float]:
    return torch.tensor(lengths).double().quantile(torch.tensor(levels, dtype=torch.float64)).tolist()


# ---------------------------------------------------------------- distributions of lengths


@pytest.mark.parametrize(
    ("name", "expected", "mean", "longest"),
    [
        ("movielens", (10, 70, 233, 451), 101, 736),
        ("beauty", (5, 6, 14, 43), 8.9, 204),
        ("grocery", (3, 5, 17, 54), 8.3, 202),
        ("diginetica", (1, 3, 9, 20), 4.1, 54),
    ],
)
def test_fitted_laws_have_the_quantiles_of_the_real_ones(
    name: str, expected: tuple[int, ...], mean: float, longest: int
) -> None:
    distribution = shapes.length_distributions(NOWHERE)[name]
    assert distribution.source == "fitted"
    lengths = distribution.lengths(50_000)
    assert quantiles(lengths, 0.1, 0.5, 0.9, 0.99) == pytest.approx(expected, rel=0.08, abs=1)
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.08)
    assert max(lengths) <= longest


@pytest.mark.parametrize(
    ("name", "mean", "shortest", "longest"),
    [
        ("uniform 1..50", 25.5, 1, 50),
        ("log-normal, mean 100", 100, 1, 1000),
        ("log-normal, mean 500", 500, 1, 2048),
        ("all 1024", 1024, 1024, 1024),
        ("all 104", 104, 104, 104),
        ("fill 0.1", 51.2, 0, 512),
        ("fill 0.5", 256, 0, 512),
        ("fill 1.0", 512, 512, 512),
    ],
)
def test_synthetic_laws_have_the_mean_and_bounds_of_their_names(
    name: str, mean: float, shortest: int, longest: int
) -> None:
    lengths = shapes.length_distributions(NOWHERE)[name].lengths(50_000)
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.05)
    assert shortest <= min(lengths) <= max(lengths) <= longest


def test_real_lengths_are_taken_where_their_file_is(tmp_path: Path) -> None:
    (tmp_path / "lengths").mkdir()
    (tmp_path / "lengths/5core_beauty.json").write_text("[7, 9]")
    for place in (tmp_path, tmp_path / "lengths", tmp_path / "beside"):
        distribution = shapes.length_distributions(place)["beauty"]
        assert distribution.source == "real"
        assert set(distribution.lengths(50)) == {7, 9}


def test_lengths_come_from_the_seed() -> None:
    distribution = shapes.length_distributions(NOWHERE)["beauty"]
    assert distribution.lengths(40, seed=1) == distribution.lengths(40, seed=1) != distribution.lengths(40, seed=2)


# ---------------------------------------------------------------- the grid


def test_every_op_meets_every_law() -> None:
    distributions = shapes.length_distributions(NOWHERE)
    assert set(distributions) == {*LAWS, "completejourney"}  # which is for candidates
    for op in workloads.OPS:
        assert {shape.distribution.name for shape in grid.shapes(distributions, [op])} == set(LAWS)


def test_the_grid_has_every_size_that_is_promised() -> None:
    all_shapes = grid.shapes(shapes.length_distributions(NOWHERE))
    attention = [
        shape for shape in all_shapes if shape.op in ("jagged_attention", "pma_pooling", "gated_cross_attention")
    ]
    assert {shape.sizes.heads for shape in attention} >= {2, 4, 8}
    assert {shape.sizes.head_size for shape in attention} >= {16, 32, 64}
    assert {shape.sizes.queries for shape in attention if shape.op == "pma_pooling"} == {1, 2, 4, 32}
    assert {shape.sizes.queries for shape in attention if shape.op == "gated_cross_attention"} >= {1, 2, 4, 8, 16}
    folded = {(s.sizes.width, s.sizes.heads, s.sizes.queries) for s in all_shapes if s.op == "pma_folded"}
    assert folded == {(64, 4, 4), (128, 8, 2), (64, 4, 2)}
    paper = [shape for shape in all_shapes if shape.distribution.name == "all 104"]
    assert all(
        shape.rows == 2048 and max(s.width, s.heads * s.head_size) == 64 for shape in paper for s in [shape.sizes]
    )
    for op in workloads.OPS:
        of_op = [shape for shape in all_shapes if shape.op == op]
        assert {dtype for shape in of_op for dtype in shape.dtypes} == {"float32", "bfloat16"}
        assert any(shape.memory and shape.distribution.name == "fill 0.1" for shape in of_op)
        assert any(shape.quick for shape in of_op)
    assert {shape.kind for shape in all_shapes} == set(targets.KINDS)


@pytest.mark.parametrize(
    ("law", "rows", "sizes"),
    [
        ("log-normal, mean 100", 256, Sizes(4, 32)),
        ("uniform 1..50", 1024, Sizes(2, 32)),
        ("log-normal, mean 500", 64, Sizes(4, 64)),
        ("all 1024", 16, Sizes(8, 64)),
    ],
)
def test_the_prototypes_cases_are_in_the_grid(law: str, rows: int, sizes: Sizes) -> None:
    selected = grid.shapes(shapes.length_distributions(NOWHERE), ["jagged_attention"])
    assert [(s.rows, s.sizes) for s in selected if s.distribution.name == law] == [(rows, sizes)]


def test_shapes_are_chosen_by_op_law_and_size() -> None:
    distributions = shapes.length_distributions(NOWHERE)
    selected = grid.shapes(distributions, ["pma_pooling"], ["beauty"], rows=3)
    assert [(s.op, s.distribution.name, s.rows) for s in selected] == [("pma_pooling", "beauty", 3)]
    assert 0 < len(grid.shapes(distributions, quick=True)) < len(grid.shapes(distributions)) / 3
    named = grid.shapes(distributions, ["pma_pooling"], ["diginetica"], quick=True)
    assert [s.distribution.name for s in named] == ["diginetica"]  # a law that is asked for is measured


# ---------------------------------------------------------------- peers


MEMORY_BOUND = ("apply_rotary", "jagged_softmax", "jagged_weighted_sum")  # grouping rows would only add copies
SIZES = {
    "pma_folded": Sizes(heads=2, head_size=8, queries=3, width=16),
    "personalized_ffn": Sizes(head_size=12, width=7),
    "gated_cross_attention": Sizes(heads=2, head_size=8, queries=3, gated=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", workloads.OPS)
def test_every_peer_is_right_with_empty_rows_among_the_others(op: str, dtype: torch.dtype) -> None:
    sizes = SIZES.get(op, Sizes(heads=2, head_size=8, queries=2))
    checker = checks.Checker(op, (5, 1, 0, 33), sizes, dtype)
    candidates = registry.candidates(op, compile_too=False)
    assert len(candidates) >= 3
    assert {name: checker.check(name, peer).problem for name, peer in candidates.items()} == dict.fromkeys(candidates)


@pytest.mark.parametrize("op", [op for op in workloads.OPS if op != "apply_rotary"])
def test_compiled_peers_are_right_as_they_are_written(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run uncompiled here, on rows that are grouped, with rows of one token and of none among them."""
    monkeypatch.setattr(compiled, "compiled", lambda function, any_threads=True: function)
    chosen = {name: p for name, p in registry.candidates(op).items() if name.rpartition(", ")[2].startswith("torch.co")}
    kinds = {name.rpartition(", ")[2] for name in chosen}
    assert "torch.compile" in kinds
    assert len(kinds) > 1 or op in MEMORY_BOUND
    checker = checks.Checker(op, (5, 1, 6, 33, 5, 0), SIZES.get(op, Sizes(heads=2, head_size=8)), torch.float32)
    assert {name: checker.check(name, peer).problem for name, peer in chosen.items()} == dict.fromkeys(chosen)


@pytest.mark.parametrize("op", [op for op in workloads.OPS if op not in MEMORY_BOUND])
def test_rows_of_similar_length_are_peers_everywhere(op: str) -> None:
    names = {name.rpartition(", ")[2].split()[0] for name in registry.candidates(op, compile_too=False)}
    assert {"bucketed", "sorted"} <= names
    assert ("FBGEMM" in names) == fbgemm.installed()


def test_fbgemm_is_listed_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fbgemm, "installed", lambda: False)
    assert "FBGEMM" not in TABLE["jagged_attention"].peers()


def test_fbgemm_computes_where_it_is_installed() -> None:
    pytest.importorskip("fbgemm_gpu", exc_type=(ImportError, OSError))
    x, weight, bias = torch.randn(5, 3), torch.randn(2, 3, 4), torch.randn(2, 4)
    out = fbgemm.ffn(x, weight, torch.tensor([0, 2, 5]), bias)
    torch.testing.assert_close(out, torch.cat([x[:2] @ weight[0] + bias[0], x[2:] @ weight[1] + bias[1]]))


def test_rows_are_grouped_by_length_without_much_padding() -> None:
    lengths = [5, 0, 8, 1, 33, 4, 64, 2, 3, 50, 0]
    in_buckets = [[lengths[row] for row in group] for group in buckets.by_powers(lengths)]
    assert in_buckets == [[64, 50, 33], [8, 5], [4, 3], [2], [1]]
    for grouping, width in ((buckets.by_powers, buckets.BUCKET_WIDTH), (buckets.by_chunks, buckets.CHUNK_WIDTH)):
        groups = grouping(lengths)
        assert sorted(row for group in groups for row in group) == [row for row, n in enumerate(lengths) if n]
        assert all(max(lengths[row] for row in group) <= width * min(lengths[row] for row in group) for group in groups)


def test_grouped_peers_need_memory_for_what_they_pad() -> None:
    arguments = workloads.inputs("jagged_attention", (100, *[1] * 99), Sizes(heads=1, head_size=8), torch.float32)
    padded = peers.Peer(lambda **_: torch.empty(0), tokens=1)
    assert padded.needs(arguments) == 100 * 100 * 8 * 4
    assert replace(padded, within=2.0).needs(arguments) == (100 + 99 * 2) * 8 * 4
    assert [replace(padded, within=w).padded_length(3, 100) for w in (0.0, 2.0, 50.0)] == [100, 6.0, 100]
    assert replace(padded, tokens=0).padded_length(3, 100) == 3


def test_what_is_folded_is_what_is_projected() -> None:
    arguments = workloads.inputs("pma_folded", (4, 0, 2), SIZES["pma_folded"], torch.float64)
    call = {name: x for name, x in arguments.items() if name != "grad_out"}
    torch.testing.assert_close(workloads.ours("pma_folded")(**call), workloads.definition("pma_folded", call))


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        (lambda peer: lambda **arguments: peer(**arguments) * 1.001, "wrong out"),
        (lambda peer: lambda **arguments: peer(**{**arguments, "v": arguments["v"].detach()}), "failed: RuntimeError"),
        (lambda peer: lambda **arguments: torch.ones(2) @ torch.ones(3), "failed: RuntimeError"),
    ],
    ids=["wrong", "no gradient", "raises"],
)
def test_a_wrong_peer_is_not_timed(wrong: Callable[..., Any], shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = registry.candidates("pma_pooling", compile_too=False)
    right = {name: candidates[name] for name in (peers.OURS, "padded SDPA")}
    broken = peers.Peer(wrong(candidates["per-row SDPA"].run))
    monkeypatch.setattr(run, "candidates", lambda *_: {**right, "broken": broken})
    shape = grid.Shape("pma_pooling", shapes.length_distributions(NOWHERE)["diginetica"], rows=8)
    measured = list(run.measure([shape], run.Settings(threads=(1,), seconds=0.0)))
    assert [measurement.runner for measurement in measured if measurement.median is None] == ["broken"] * 2
    assert [measurement.direction for measurement in measured] == [d for d in run.PASSES for _ in range(3)]
    problems = report.problems(measured)
    assert len(problems) == 1
    assert shown in problems[0]


def test_what_is_too_large_is_not_tried() -> None:
    shape = grid.Shape(
        "jagged_attention", shapes.length_distributions(NOWHERE)["log-normal, mean 500"], 64, Sizes(4, 64)
    )
    inputs = shape.inputs(torch.float32)
    eager, padded = (registry.candidates("jagged_attention")[name] for name in ("eager with mask", "padded SDPA"))
    # Scores alone: 64 rows, 4 heads, longest squared, 4 bytes, three times.
    longest = max(shape.lengths())
    scores_bytes = 3 * 64 * 4 * longest**2 * 4
    assert scores_bytes <= eager.needs(inputs) <= 1.2 * scores_bytes
    assert "GiB" in (run.too_large(eager, inputs, run.PASSES[0]) or "")
    assert run.too_large(padded, inputs, run.PASSES[0]) is None
    # Two rows of 10 places in a second (3 with gradients): 64 rows of `longest` take so many times as long.
    verdict = checks.Verdict(None, forward=1.0, training=3.0)
    slowdown = 64 * longest**2 / (2 * 10**2)
    seconds = [run.expected_seconds(shape, padded, (10, 1), verdict, direction) for direction in run.PASSES]
    assert seconds == pytest.approx([slowdown, 3 * slowdown])


def test_a_peer_far_behind_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = registry.candidates("pma_pooling", compile_too=False)
    chosen = {name: candidates[name] for name in (peers.OURS, "padded SDPA", "per-row SDPA", "bucketed SDPA")}
    monkeypatch.setattr(run, "candidates", lambda *_: chosen)
    expected = {"padded SDPA": 1.0, "per-row SDPA": 11.0, "bucketed SDPA": 99.0}  # grouped rows are always timed
    monkeypatch.setattr(
        run, "expected_seconds", lambda shape, peer, *_: next(expected[n] for n, p in chosen.items() if p is peer)
    )
    shape = grid.Shape("pma_pooling", shapes.length_distributions(NOWHERE)["diginetica"], rows=8)
    measured = list(run.measure([shape], run.Settings(threads=(1,), seconds=0.0)))
    assert {(measurement.runner, measurement.problem) for measurement in measured if measurement.problem} == {
        ("per-row SDPA", "would take about 11 s")
    }
    assert [measurement.runner for measurement in measured if measurement.median is None] == ["per-row SDPA"] * 2


# ---------------------------------------------------------------- numbers of threads


def test_everything_is_tried_at_each_number_of_threads_up_to_four_and_at_powers_beyond() -> None:
    assert threads.counts([2]) == [2, 1]
    assert threads.counts([1, 3]) == [3, 2, 1]
    assert threads.counts([12]) == [12, 8, 4, 3, 2, 1]


def test_everybody_counts_at_the_best_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is faster on two threads and a peer on one; a peer that is far behind on two is not timed on one."""
    candidates = registry.candidates("pma_pooling", compile_too=False)
    chosen = {name: candidates[name] for name in (peers.OURS, "padded SDPA", "per-row SDPA")}
    monkeypatch.setattr(run, "candidates", lambda *_: chosen)
    seconds = {2: {peers.OURS: 1.0, "padded SDPA": 3.0, "per-row SDPA": 40.0}, 1: {peers.OURS: 1.5, "padded SDPA": 2.0}}

    def planted(calls: dict[str, Any], device: str, share: float) -> dict[str, timing.Timing]:
        assert share == 4.0  # the time for two threads is shared by two numbers of them
        return {name: timing.Timing.of([seconds[torch.get_num_threads()][name]]) for name in calls}

    monkeypatch.setattr(timing, "interleaved", planted)
    shape = grid.Shape("pma_pooling", shapes.length_distributions(NOWHERE)["diginetica"], rows=8)
    measured = list(run.measure([shape], run.Settings(threads=(2,), seconds=8.0)))
    found = {m.runner: (m.median, m.best_threads) for m in measured if m.direction == "forward"}
    assert found == {peers.OURS: (1.0, 2), "padded SDPA": (2.0, 1), "per-row SDPA": (40.0, 2)}
    assert {m.threads for m in measured} == {2}
    assert not any(m.problem for m in measured)
    assert report.dropped(measured) == [
        "pma_pooling: per-row SDPA was .. times slower than the best peer on .. threads "
        "(diginetica, H1 D16 M1, float32, forward: 13 2; diginetica, H1 D16 M1, float32, forward+backward: 13 2)"
    ]


def test_a_load_between_shapes_marks_the_shapes_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "candidates", lambda *_: {peers.OURS: registry.candidates("pma_pooling")[peers.OURS]})
    loads = iter((1.0, 1.0, 0.5, 1.0, 1.0))
    monkeypatch.setattr(quiet, "check", lambda threads: quiet.Quietness(threads, next(loads), 0.0, 2e-5, 1e-5))
    laws = shapes.length_distributions(NOWHERE)
    four = [grid.Shape("pma_pooling", laws["diginetica"], rows=rows) for rows in (2, 3, 4, 5)]
    measured = list(run.measure(four, run.Settings(threads=(1,), seconds=0.0), watch=quiet.Watch(1)))
    assert {m.rows for m in measured if m.busy} == {3, 4}


# ---------------------------------------------------------------- timing


def test_interleaved_runs_take_turns_and_report_medians() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.interleaved(runs, seconds=1.0, min_samples=3, max_samples=3)
    assert {name: timed.samples for name, timed in times.items()} == {"a": 3, "b": 3}
    order = "".join(calls[4:])  # after two calls of each before the timing
    assert order.lstrip("a").startswith("b")
    assert "a" in order.lstrip("a").lstrip("b")
    assert timing.interleaved(runs, seconds=0.0)["b"].samples == 1  # slow runs are not repeated for ever
    assert timing.Timing.of([3.0, 1.0, 2.0, 100.0]) == timing.Timing(2.5, 1.75, 27.25, 4)
    assert timing.Timing.of([2.0]) == timing.Timing(2.0, 2.0, 2.0, 1)


def test_a_call_far_behind_gets_its_warm_up_as_its_only_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    seconds = {"ours": 1.0, "best peer": 8.0, "close": 16.0, "slow": 25.0}

    def once(call: Callable[[], str], device: str = "cpu", repeats: int = 1) -> float:
        calls.append(call())
        return seconds[calls[-1]]

    monkeypatch.setattr(timing, "once", once)
    times = timing.interleaved({name: lambda name=name: name for name in seconds}, seconds=4.0, slow=100.0)
    assert {name: timed.samples for name, timed in times.items()} == {"ours": 3, "best peer": 3, "close": 3, "slow": 1}
    assert calls.count("slow") == 2
    assert times["slow"].median == 25.0


def test_the_machines_rates_are_those_of_each_dtype_and_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_GEMM_SIZES", (64, 32))
    monkeypatch.setattr(timing, "_COPY_BYTES", 1 << 16)
    machine = timing.Machine()
    for dtype in (torch.float32, torch.float64):
        machine.sample(dtype)
    rates = machine.rates()
    assert set(rates) == {("float32", 1), ("float64", 1)}
    assert all(rate.gemm > 0 and rate.copy > 0 and rate.size == 64 for rate in rates.values())


def test_the_bench_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--op", "personalized_ffn", "--rows", "4", "--seconds", "0", "--threads", "1", "--quick"]
    target = tmp_path / "made" / "bench.json"
    assert main([*chosen, "--law", "movielens", "--dtype", "float32", "--json", str(target)]) == 0
    written = json.loads(target.read_text())
    assert {(line["law"], line["rows"], line["threads"]) for line in written["measurements"]} == {("movielens", 4, 1)}
    assert [line["dtype"] for line in written["machine"]] == ["float32"]
    assert "Kernels: " in capsys.readouterr().out


def test_a_run_that_is_stopped_reports_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: Any) -> Iterator[run.Measurement]:
        yield from itertools.islice(measure(*arguments), 3)
        raise KeyboardInterrupt

    measure = run.measure
    monkeypatch.setattr(run, "measure", stopped)
    target = tmp_path / "bench.json"
    chosen = ["--op", "personalized_ffn", "--law", "beauty", "--rows", "4", "--seconds", "0", "--threads", "1"]
    main([*chosen, "--no-compile", "--json", str(target)])
    assert len(json.loads(target.read_text())["measurements"]) == 3
