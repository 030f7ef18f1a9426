"""The metrics compared with scikit-learn and with hand-computed numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from interformer import metrics
from sklearn.metrics import log_loss, roc_auc_score


def _impressions(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores with many ties, and users with very different numbers of impressions (some with one class)."""
    rng = np.random.default_rng(seed)
    user = rng.geometric(0.15, 400)
    score = np.round(rng.normal(size=400), 1)
    label = (rng.random(400) < 1 / (1 + np.exp(-score))).astype(np.float32)
    return label, score, user


@pytest.mark.parametrize("seed", range(3))
def test_grouped_auc_is_the_weighted_mean_of_users_aucs(seed: int) -> None:
    label, score, user = _impressions(seed)
    total = weight = 0.0
    for user_id in np.unique(user):
        of_user = user == user_id
        if len(set(label[of_user])) == 2:
            total += of_user.sum() * roc_auc_score(label[of_user], score[of_user])
            weight += of_user.sum()
    assert weight < len(label), "the case must hold users with one class"
    assert metrics.grouped_auc(label, score, user) == pytest.approx(total / weight, abs=1e-12)


def test_grouped_auc_by_hand() -> None:
    label, score = [1, 0, 1, 0, 1, 1], [2.0, 1.0, 0.5, 0.5, 0.1, 0.9]
    user = [7, 7, 3, 3, 3, 9]  # user 7: 1; user 3: pairs (.5, .5) and (.1, .5): (0.5 + 0) / 2; user 9: one class
    assert metrics.grouped_auc(label, score, user) == pytest.approx((2 * 1 + 3 * 0.25) / 5)


def test_logloss_and_auc_are_those_of_scikit_learn() -> None:
    label, score, user = _impressions(5)
    result = metrics.evaluate(label, score, user, train_rate=0.3)
    assert result.auc == pytest.approx(roc_auc_score(label, score))
    assert result.logloss == pytest.approx(log_loss(label, 1 / (1 + np.exp(-score))))
    assert result.ne == pytest.approx(result.logloss / -(0.3 * math.log(0.3) + 0.7 * math.log(0.7)))


def test_predicting_the_mean_rate_has_ne_one() -> None:
    label = np.array([1, 0, 0, 0])
    assert metrics.evaluate(label, np.full(4, math.log(0.25 / 0.75)), label, 0.25).ne == pytest.approx(1)


def test_logloss_of_huge_logits_is_finite() -> None:
    assert metrics.logloss([1, 0], [-800.0, -800.0]) == pytest.approx(400)


@pytest.mark.parametrize("label", [[0, 0], [1, 1], []])
def test_what_is_undefined_is_nan(label: list[int]) -> None:
    score, user = np.arange(len(label), dtype=float), np.zeros(len(label))
    assert math.isnan(metrics.auc(label, score))
    assert math.isnan(metrics.grouped_auc(label, score, user))


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1])
def test_a_rate_without_entropy_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1, found"):
        metrics.entropy(rate)
