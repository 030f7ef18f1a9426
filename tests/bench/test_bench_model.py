"""The bench of whole models: the padded model is InterFormer, and the report shows the measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interformer import InterFormer, InterFormerConfig
from interformer.testing import random_batch, small_schema
from interformer_bench import quiet, shapes, timing
from interformer_bench.model import __main__ as command
from interformer_bench.model import by_length, cases, contenders, measure, profiles, report
from interformer_bench.model.by_length import ByLengthInterFormer, bucketed
from interformer_bench.model.padded import PaddedInterFormer, padded
from interformer_bench.progress import Progress
from module_budget import assert_within_budget, perturbed
from torch import Tensor

SMALL = InterFormerConfig(
    embed_dim=8,
    num_heads=2,
    num_layers=2,
    interaction_hidden=(12,),
    pffn_hidden=(6,),
    head_hidden=(16,),
    max_history=40,
)
LAWS = shapes.length_distributions(Path("nowhere"))
TINY = cases.Case(LAWS["diginetica"], 3, cases.TRAINING, ratio=2.0, memory=0.5)
ANSWER = cases.Case(LAWS["diginetica"], 2, cases.INFERENCE)


@pytest.mark.parametrize("lengths", [(3, 0, 17, 1, 9, 40), (5, 5, 5)], ids=["mixed", "full"])
@pytest.mark.parametrize("peer", ["padded", "by length"])
def test_padded_models_are_interformer(monkeypatch: pytest.MonkeyPatch, peer: str, lengths: tuple[int, ...]) -> None:
    monkeypatch.setattr(by_length, "_CALL", 1)  # else so few rows are one bucket
    reference = perturbed(InterFormer(replace(SMALL, backend="reference"), small_schema()), by=0.1)
    if peer == "padded":
        model: Any = PaddedInterFormer(SMALL, small_schema(), full=len(set(lengths)) == 1)
    else:
        model = ByLengthInterFormer(SMALL, small_schema())
    model.load_state_dict(reference.state_dict())

    def run(model: Any, inputs: Mapping[str, Any]) -> Tensor:
        batch: Any = random_batch(model.schema, lengths, seed=inputs["seed"])
        if isinstance(model, ByLengthInterFormer):
            batch = bucketed(batch, SMALL.num_cls)
            assert len(batch.buckets) == len(set(lengths))
        elif isinstance(model, PaddedInterFormer):
            batch = padded(batch)
        return model(batch)

    assert_within_budget(reference, model, lambda seed: {"seed": seed}, run, max_draws=16)


def test_rows_are_cut_into_the_cheapest_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, num_cls = [7, 0, 3, 7, 30, 8, 3, 1], 4
    monkeypatch.setattr(by_length, "_CALL", 20)
    monkeypatch.setattr(by_length, "_ATTENTION", 10)

    def cost(groups: list[list[int]]) -> float:
        widths = [num_cls + max(lengths[row] for row in group) for group in groups]
        return sum(20 + len(group) * width * (1 + width / 10) for group, width in zip(groups, widths, strict=True))

    rows = sorted(range(8), key=lengths.__getitem__)
    ways = []
    for cuts in range(2**7):
        ends = [place for place in range(1, 8) if cuts >> (place - 1) & 1]
        ways.append([rows[start:end] for start, end in zip([0, *ends], [*ends, 8], strict=True)])
    found = by_length.grouped(lengths, num_cls)
    assert sorted(row for group in found for row in group) == list(range(8))
    assert cost(found) == min(map(cost, ways))
    assert 1 < len(found) < len(set(lengths))


def test_a_form_that_is_not_written_on_padded_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="pffn must be 'mlp' on padded rows, found 'rank'"):
        PaddedInterFormer(replace(SMALL, pffn="rank"), small_schema(), full=False)


def test_padding_keeps_every_event_and_drops_the_tail() -> None:
    batch = random_batch(small_schema(), (2, 0, 3), tail=4)
    rows = padded(batch).sequences.unflatten(0, (3, 3))
    assert torch.equal(rows[0, :2], batch.sequences[:2])
    assert torch.equal(rows[2], batch.sequences[2:5])
    assert not rows[1].any()


def test_long_histories_are_those_that_the_paper_speaks_of() -> None:
    long = next(case.distribution for case in cases.cases(LAWS) if "513" in case.distribution.name)
    lengths = torch.tensor(long.lengths(100_000)).double()
    assert lengths.mean() == pytest.approx(513, rel=0.02)
    assert lengths.quantile(0.95) == pytest.approx(1384, rel=0.02)


def test_a_single_row_has_the_median_length() -> None:
    assert cases.Case(LAWS["movielens"], 1, cases.INFERENCE).lengths() == (70,)


def test_every_contender_computes_the_same() -> None:
    for name in contenders.contenders(compile_too=False):
        assert measure.wrong(name, TINY.lengths()) is None


def test_a_wrong_contender_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    make = contenders.make

    def spoiled(name: str, batch: Any) -> contenders.Contender:
        contender = make(name, batch)
        if name == contenders.REFERENCE:
            return contender
        return contender._replace(call=lambda batch: contender.call(batch) + 1)

    monkeypatch.setattr(measure, "make", spoiled)
    monkeypatch.setattr(measure, "_peak", lambda case, name, data: 0)
    measured = list(measure.measure([TINY], None, False, 0.01, Progress()))
    assert "wrong logits" in (measured[0].problem or "")
    assert measured[0].time is None
    assert any("wrong logits" in cell for line in report.table(measured) for cell in line)


def test_what_memory_does_not_hold_is_not_tried() -> None:
    huge = cases.Case(LAWS["movielens"], 100_000, cases.INFERENCE)
    assert "would pad to" in (contenders.unsupported_reason(contenders.PADDED, huge) or "")
    assert contenders.unsupported_reason(contenders.OURS, huge) is None


def test_one_bucket_is_no_contender_of_its_own() -> None:
    reason = contenders.unsupported_reason(contenders.BY_LENGTH, TINY)
    assert reason == "has one bucket: it is the padded model"


@pytest.mark.parametrize(("fastest", "tried"), [(1e-6, False), (1e3, True)], ids=["far behind", "close"])
def test_a_model_that_is_foretold_to_be_far_behind_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, fastest: float, tried: bool
) -> None:
    monkeypatch.setattr(measure, "_SAMPLE_TOKENS", 40)
    monkeypatch.setattr(measure, "SKIP_SECONDS", 0.0)
    case = cases.Case(LAWS["diginetica"], 64, cases.INFERENCE)
    found = measure.too_slow(contenders.PADDED, case, {contenders.OURS: 1e-9, contenders.BY_LENGTH: fastest})
    assert (found is None) is tried
    assert tried or "times as long as the best padded model" in str(found)
    assert measure.too_slow(contenders.BY_LENGTH, case, {contenders.BY_LENGTH: fastest}) is None
    assert measure.too_slow(contenders.PADDED, case, {contenders.OURS: 1e-9}) is None


def _measured(our_seconds: float, padded_seconds: float, peaks: tuple[int, int]) -> list[measure.Measured]:
    times = [timing.Timing(median, median, median, 5) for median in (our_seconds, padded_seconds)]
    names = contenders.OURS, contenders.PADDED
    return [measure.Measured(TINY, *time_and_name) for time_and_name in zip(names, times, peaks, strict=True)]


@pytest.mark.parametrize(
    ("padded_seconds", "peaks", "verdicts"),
    [(0.5, (40, 100), ["pass", "pass"]), (0.1, (60, 100), ["MISS", "MISS"])],
    ids=["reached", "missed"],
)
def test_targets_are_judged(padded_seconds: float, peaks: tuple[int, int], verdicts: list[str]) -> None:
    (group,) = report.groups(_measured(0.1, padded_seconds, peaks))
    assert [text.split()[-1] for text in report.verdicts(group)] == verdicts
    assert f"{padded_seconds / 0.1:.2f}x" in report.markdown(list(group.values()), "head")


def test_the_best_of_all_padded_models_counts() -> None:
    measured = _measured(0.1, 0.5, (40, 100))
    by_length_time = timing.Timing(0.15, 0.15, 0.15, 5)
    group = report.groups([*measured, measure.Measured(TINY, contenders.BY_LENGTH, by_length_time)])[0]
    assert report.verdicts(group)[0] == ">= 2x the best, padded by length: 1.50x MISS"


def test_a_busy_machine_has_no_ratio_of_models() -> None:
    measured = [replace(result, busy="a thread got 0.50") for result in _measured(0.1, 0.5, (40, 100))]
    (group,) = report.groups(measured)
    assert report.verdicts(group) == ["a thread got 0.50", "memory <= 50%: 40% pass"]
    assert all(line[-2] == quiet.NO_RATIO for line in report.table(measured))


def test_models_count_at_their_best_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    # "c" is far behind on two threads, so it is not tried on one; ours always is.
    seconds = {
        1: {"a": 1.0, "b": 3.0, contenders.OURS: 30.0},
        2: {"a": 2.0, "b": 2.5, "c": 20.0, contenders.OURS: 20.0},
    }

    def planted(calls: Mapping[str, Any], **_: Any) -> dict[str, timing.Timing]:
        return {name: timing.Timing.of([seconds[torch.get_num_threads()][name]]) for name in calls}

    before = torch.get_num_threads()
    monkeypatch.setattr(timing, "interleaved", planted)
    torch.set_num_threads(2)
    try:
        found, busy = measure.at_best(dict.fromkeys(seconds[2], lambda: None), 1.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    best = {name: (number, time.median) for name, (number, time) in found.items()}
    assert best == {"a": (1, 1.0), "b": (2, 2.5), "c": (2, 20.0), contenders.OURS: (2, 20.0)}
    assert busy is None


def test_models_are_timed_between_checks_at_every_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Planted(quiet.Watch):
        def busy_since_last(self) -> str | None:
            self.checks.append(self.checks[0])
            return "busy" if len(self.checks) == 3 else None  # after the first number of threads

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        watch = Planted(1)
        _, busy = measure.at_best({"a": lambda: None}, 0.01, watch)
    finally:
        torch.set_num_threads(before)
    assert busy == "busy"
    assert len(watch.checks) == 5  # at the start, before and after each number


def test_the_shares_of_a_profile_are_those_of_the_whole_call() -> None:
    shares = profiles.shares(TINY, contenders.OURS, calls=1)
    assert {"kernels", "products over tokens", "products over rows", "optimiser", profiles.BETWEEN} <= shares.keys()
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert sum(int(line[-1].rstrip("%")) for line in profiles.table(ANSWER, contenders.OURS)) == pytest.approx(
        100, abs=5
    )


def test_the_command_measures_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "cases", lambda laws: [TINY, ANSWER])
    # Their processes know no such case; one of them is tested by itself.
    monkeypatch.setattr(measure, "_peak", lambda case, name, data: 2**20)
    arguments = ["--no-compile", "--seconds", "0.01", "--case", "training", "--out", str(tmp_path), "--threads", "1"]
    before = torch.get_num_threads()
    try:
        assert command.main(arguments) == 0
    finally:
        torch.set_num_threads(before)
    assert "padded SDPA" in capsys.readouterr().out
    written = json.loads((tmp_path / "model.json").read_text())
    assert {line["contender"] for line in written} == set(contenders.contenders(compile_too=False))
    assert {line["case"] for line in written} == {TINY.name}
    assert (tmp_path / "model.md").read_text().count("diginetica") == len(written)


def test_an_unknown_case_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--case", "nonsense"]) == 2
    assert "--case must be part of one of: movielens x 32, training step" in capsys.readouterr().err


def test_peaks_are_measured_in_a_process_of_their_own() -> None:
    case = next(case for case in cases.cases(shapes.length_distributions()) if case.name == "movielens x 1, inference")
    peak = measure._peak(case, contenders.OURS, None)
    assert isinstance(peak, int)
    assert peak < 64 * 2**20
    assert "failed: StopIteration" in str(measure._peak(TINY, contenders.OURS, None))
