"""Boosted trees learn from ids and dense scalars, stop on the validation part, and read the test part once or never."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interformer.boosting import LEAVES, TREES, boost
from interformer.data import SyntheticLaw, synthesize
from interformer.data.clicks import Clicks, Splits
from interformer.experiments.plan import read
from interformer.experiments.runs import Machine, jobs_of
from interformer.experiments.worker import ForbiddenTest, run
from interformer.files import read_sealed
from interformer.train import TrainConfig

CONFIG = TrainConfig(epochs=3, patience=1, lr=0.2)


def _splits() -> Splits:
    """Clicks whose label says whether a bucket, the last field, is large, but for one in ten."""
    splits = synthesize(SyntheticLaw(num_users=200, mean_length=3.0))
    generator = torch.Generator().manual_seed(0)

    def labelled(clicks: Clicks) -> Clicks:
        wrong = torch.rand(len(clicks), generator=generator) < 0.1
        large = clicks.categorical[:, -1] > clicks.categorical[:, -1].float().mean()
        return replace(clicks, label=(large ^ wrong).float())

    return replace(splits, **{name: labelled(part) for name, part in splits.parts().items()})


def test_it_learns_and_reports_its_best_epoch() -> None:
    splits = _splits()
    report = boost(splits, CONFIG)
    assert report.test is not None
    assert report.test.auc > 0.85
    curve = [record.valid["auc"] for record in report.history]
    assert report.valid.auc == max(curve) == curve[report.best_epoch]
    assert report.parameters == TREES * LEAVES * (report.best_epoch + 1)
    losses = [record.loss for record in report.history]
    assert losses == sorted(losses, reverse=True)
    again = boost(splits, CONFIG)
    assert (again.test, [record.loss for record in again.history]) == (report.test, losses)


def test_test_metrics_are_those_of_the_best_epochs_trees() -> None:
    splits = _splits()
    long = boost(splits, replace(CONFIG, epochs=8, patience=8, lr=0.9))
    short = boost(splits, replace(CONFIG, epochs=long.best_epoch + 1, patience=8, lr=0.9))
    assert long.best_epoch < 7, "the case must overfit"
    assert long.test == short.test


def test_without_measuring_the_test_part_is_not_read() -> None:
    forbidden: Any = ForbiddenTest()
    assert boost(replace(_splits(), test=forbidden), CONFIG, measure_test=False).test is None


def test_patience_ends_it() -> None:
    report = boost(_splits(), replace(CONFIG, epochs=50, lr=0.9))
    assert len(report.history) == report.best_epoch + 2 < 50


@pytest.mark.parametrize("kind", ["boosting", "hstu"])
def test_it_is_a_kind_of_an_experiments_variants(kind: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(f"""
name: trial
data: {{reader: synthetic, num_users: 40, impressions_per_user: 4, mean_length: 5}}
seeds: [1]
base:
  model: {{embed_dim: 4, num_heads: 1, num_layers: 1, head_hidden: [4], max_history: 8}}
  training: {{epochs: 2, batch_size: 64, lr: 0.1}}
variants:
  one: {{kind: {kind}}}
""")
    plan = read(tmp_path / "plan.yaml")
    (job,) = jobs_of(plan, plan.variants, tmp_path, Machine(), clicks=None)
    job = replace(job, identity={**job.identity, "data": dict(plan.data)})
    job.write()
    threads, sent = torch.get_num_threads(), []
    try:
        run(job, tmp_path, sent.append)
    finally:
        torch.set_num_threads(threads)
    assert len(read_sealed(job.result)["report"]["history"]) == 2
    assert [message["epoch"] for message in sent if "valid_auc" in message] == [0, 1]
