"""The claims of the synthetic data's docstring."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interformer.data import Clicks, SyntheticLaw, synthesize
from interformer.data.synthetic import _history_lengths
from interformer.metrics import auc

LAW = SyntheticLaw(num_users=400, impressions_per_user=5, seed=3)


@pytest.fixture(scope="module")
def train() -> Clicks:
    return synthesize(LAW).train


def test_a_law_gives_the_same_clicks_whatever_the_state_of_the_generator() -> None:
    small = replace(LAW, num_users=40)
    torch.manual_seed(1)
    first = synthesize(small)
    torch.manual_seed(2)
    repeated, of_other_seed = synthesize(small), synthesize(replace(small, seed=4))
    for name in ("dense", "categorical", "events", "first", "last", "label", "user"):
        assert getattr(first.train, name).equal(getattr(repeated.train, name)), name
    assert not first.train.label.equal(of_other_seed.train.label)
    assert first.facts == repeated.facts


def test_lengths_have_the_quantiles_of_movielens() -> None:
    lengths = _history_lengths(SyntheticLaw(num_users=20000), torch.Generator().manual_seed(0)).double()
    quantiles = torch.quantile(lengths.flatten()[:1_000_000], torch.tensor([0.1, 0.5, 0.9, 0.99], dtype=torch.float64))
    torch.testing.assert_close(quantiles, torch.tensor([10.0, 70, 233, 451]).double(), rtol=0.03, atol=0.5)
    assert lengths.max() <= 736
    assert (lengths == 0).double().mean() == pytest.approx(0.01, abs=0.002)


def test_users_are_in_one_part_and_the_oracle_is_good_but_not_perfect() -> None:
    splits = synthesize(LAW)
    users = [set(part.user.tolist()) for part in splits.parts().values()]
    assert [len(part) for part in users] == [320, 40, 40]
    assert len(set.union(*users)) == 400
    assert 0.8 < splits.facts["oracle_auc"] < 0.97
    assert 0.4 < splits.train.rate() < 0.6


def test_what_the_label_depends_on(train: Clicks) -> None:
    """Content, the order of opinions and the last event each inform about the label; unordered opinions do less."""
    scores: dict[str, list[float]] = {"share": [], "last opinion": [], "mean opinion": [], "next": []}
    batch = train.batch(torch.arange(len(train)))
    for b in range(len(batch)):
        history = batch.sequences[int(batch.offsets[b]) : int(batch.offsets[b + 1])]
        category = batch.categorical[b, 1]
        same_category = history[:, 1] == category
        opinions = (history[same_category, 2] * 2 - 1).tolist()
        scores["share"].append(same_category.float().mean().item() if len(same_category) else 0.0)
        scores["last opinion"].append(opinions[-1] if opinions else 0)
        scores["mean opinion"].append(sum(opinions) / len(opinions) if opinions else 0)
        follows = len(history) and (history[-1, 1] + 1) % LAW.num_categories == category
        scores["next"].append(float(follows))
    result = {name: auc(train.label, score) for name, score in scores.items()}
    assert result["share"] > 0.53
    assert result["next"] > 0.56
    assert result["last opinion"] > 0.7
    assert result["last opinion"] > result["mean opinion"] + 0.05


def test_histories_are_prefixes_of_the_users_stream(train: Clicks) -> None:
    of_user = train.user == 7
    lengths = train.lengths[of_user]
    assert lengths.tolist() == sorted(lengths.tolist())
    assert len(set(train.first[of_user].tolist())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_users": 3}, "num_users must be at least 10, found 3"),
        ({"num_categories": 2}, "num_categories must be at least 5, found 2"),
        ({"num_items": 4}, "num_items must be at least 6, found 4"),
        ({"mean_length": 0.0}, "mean_length must be above 0, found 0"),
    ],
)
def test_bad_sizes_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LAW, **change)


def test_short_histories_are_an_ordinary_case() -> None:
    splits = synthesize(replace(LAW, num_users=20, mean_length=0.1))
    assert splits.train.lengths.max() <= 1
    assert len(splits.train) == 80
