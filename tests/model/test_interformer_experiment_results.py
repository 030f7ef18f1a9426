"""The figures of an experiment's table compared with NumPy; its table and plots."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interformer import InterFormerConfig
from interformer.experiments.plan import Variant
from interformer.experiments.plots import by_epoch, draw, groups
from interformer.experiments.summary import Estimate, Row, summarize
from interformer.experiments.table import format_estimate, table
from interformer.train import TrainConfig

AUC = {
    "whole": {1: 0.81, 2: 0.83, 3: 0.80},
    "less": {1: 0.80, 2: 0.825, 5: 0.9},
    "alone": {1: 0.7},
}


def _variant(name: str, group: str | None) -> Variant:
    return Variant(name, "interformer", group, InterFormerConfig(), TrainConfig(), (1, 2, 3), {})


def _report(auc: float, **changes: Any) -> dict[str, Any]:
    history = [{"epoch": i, "valid": {"auc": auc - 0.02 + 0.01 * i}} for i in range(3 if auc < 0.82 else 2)]
    return {
        "valid": {"auc": auc + 0.01},
        "test": {"auc": auc, "gauc": auc - 0.1, "logloss": 1 - auc, "ne": None},
        "history": history,
        "parameters": 1234,
        "step_ms": 10 * auc,
        "impressions_per_second": 1e4 * auc,
        "flops": {"1": 2.5e6, "100": 1.25e5},
        "peak_mib": 100 * auc,
        "seconds": 2.0,
        **changes,
    }


VARIANTS = [_variant("whole", None), _variant("less", "pieces"), _variant("alone", "baselines"), _variant("none", None)]
REPORTS = {name: {seed: _report(auc) for seed, auc in AUC.get(name, {}).items()} for name in (*AUC, "none")}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return summarize(VARIANTS, REPORTS, "whole")


def test_means_and_standard_errors(rows: list[Row]) -> None:
    whole, less, alone = rows
    values = np.array([0.81, 0.83, 0.80])
    assert whole.test["auc"].mean == pytest.approx(np.mean(values))
    assert whole.test["auc"].error == pytest.approx(np.sqrt(np.var(values, ddof=1) / 3))
    assert whole.test["logloss"].mean == pytest.approx(np.mean(1 - values))
    assert whole.valid_auc.mean == pytest.approx(np.mean(values) + 0.01)
    assert (whole.test["auc"].count, alone.test["auc"].count) == (3, 1)
    assert math.isnan(alone.test["auc"].error)
    assert math.isnan(less.test["ne"].mean)
    assert whole.seeds == (1, 2, 3)


def test_differences_are_paired_by_seed(rows: list[Row]) -> None:
    whole, less, alone = rows
    assert whole.difference is None
    paired = np.array([0.80 - 0.81, 0.825 - 0.83])  # Seeds 1 and 2 are paired; seed 5 is not.
    assert less.difference is not None
    assert less.difference.mean == pytest.approx(paired.mean())
    assert less.difference.error == pytest.approx(paired.std(ddof=1) / np.sqrt(2))
    assert less.difference.count == 2
    assert alone.difference is not None
    assert alone.difference.mean == pytest.approx(-0.11)


def test_costs(rows: list[Row]) -> None:
    whole, *_ = rows
    assert whole.step_ms == pytest.approx(8.1)  # the median of 8.1, 8.3, 8.0
    assert whole.peak_mib == pytest.approx(83)
    assert (whole.seconds, whole.parameters) == (6.0, 1234)
    assert whole.impressions_per_second == pytest.approx(8100)
    assert whole.flops == {"1": 2.5e6, "100": 1.25e5}


def test_runs_of_before_these_costs_were_counted_are_summarised() -> None:
    old = {key: value for key, value in _report(0.8).items() if key not in ("impressions_per_second", "flops")}
    (row,) = summarize(VARIANTS[:1], {"whole": {1: old}}, "whole")
    assert (row.impressions_per_second, row.flops) == (None, None)
    assert "| - | 8.00 | - |" in table("trial", [row], "whole")


def test_without_a_test_part_validation_is_compared() -> None:
    reports = {
        name: {seed: {**report, "test": None} for seed, report in runs.items()} for name, runs in REPORTS.items()
    }
    whole, less, _ = summarize(VARIANTS, reports, "whole")
    assert whole.test == {}
    assert whole.auc == whole.valid_auc
    assert less.difference is not None
    assert less.difference.mean == pytest.approx(-0.0075)


def test_the_table_has_a_line_a_variant(rows: list[Row]) -> None:
    text = table("trial", rows, "whole")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    columns = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [cells[0] for cells in columns] == ["variant", "---", "whole", "less", "alone"]
    assert {len(cells) for cells in columns} == {15}
    result = dict(zip(columns[0], columns[3], strict=True))
    assert result["group"] == "pieces"
    assert result["seeds"] == "3"
    assert result["AUC - reference"] == "-0.0075 +- 0.0025"
    assert result["NE"] == "-"
    assert result["parameters"] == "1,234"
    assert result["MFLOP a candidate, of 1 / of 100"] == "2.5 / 0.125"
    assert result["scored / s"] == "8,250"
    assert dict(zip(columns[0], columns[2], strict=True))["AUC - reference"] == "-"
    assert "All runs: 14 s" in text


@pytest.mark.parametrize(
    ("estimate", "signed", "text"),
    [
        (None, False, "-"),
        (Estimate(math.nan, math.nan, 3), False, "-"),
        (Estimate(0.5, math.nan, 1), False, "0.5000"),
        (Estimate(0.00123, 0.0004, 3), True, "+0.0012 +- 0.0004"),
    ],
)
def test_an_estimate_in_words(estimate: Estimate | None, signed: bool, text: str) -> None:
    assert format_estimate(estimate, signed=signed) == text


def test_the_reference_is_beside_every_group(rows: list[Row]) -> None:
    names = {group: [row.name for row in members] for group, members in groups(rows, "whole").items()}
    assert names == {"pieces": ["whole", "less"], "baselines": ["whole", "alone"]}
    assert list(groups(rows[:1], "whole")) == ["all"]


def test_a_curve_is_of_the_seeds_that_still_train() -> None:
    assert by_epoch([[1.0, 2.0], [3.0], [5.0, 6.0, 7.0]]) == [[1.0, 3.0, 5.0], [2.0, 6.0], [7.0]]


def test_pictures_are_drawn(tmp_path: Path, rows: list[Row]) -> None:
    drawn = {path.name for path in draw(rows, "whole", tmp_path)}
    assert drawn == {f"{kind}-{group}.png" for kind in ("curves", "bars") for group in ("pieces", "baselines")}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
