"""The metrics of CTR prediction (docs/interformer.md, section 6)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Metrics:
    """AUC, gAUC, LogLoss and NE of one set of impressions; NaN where a metric is not defined."""

    auc: float
    gauc: float
    logloss: float
    ne: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"AUC {self.auc:.4f}  gAUC {self.gauc:.4f}  LogLoss {self.logloss:.4f}  NE {self.ne:.4f}"


def evaluate(label: ArrayLike, logit: ArrayLike, user: ArrayLike, train_rate: float) -> Metrics:
    """All metrics of impressions `label [N]` in {0, 1}, `logit [N]`, `user [N]`; `train_rate`: training mean label."""
    loss = logloss(label, logit)
    return Metrics(auc(label, logit), grouped_auc(label, logit, user), loss, loss / entropy(train_rate))


def auc(label: ArrayLike, score: ArrayLike) -> float:
    """Area under the ROC curve; NaN where all labels are equal."""
    label = np.asarray(label)
    if label.size == 0 or label.min() == label.max():
        return math.nan
    return float(roc_auc_score(label, np.asarray(score)))


def grouped_auc(label: ArrayLike, score: ArrayLike, user: ArrayLike) -> float:
    """gAUC: the AUC of every user, weighted by impressions; users with one class of label are left out.

    `sum_u n_u AUC_u / sum_u n_u`, computed from ranks for all users at once; ties count half, as in AUC. NaN if no user
    has both classes.
    """
    labels, scores = np.asarray(label, np.float64), np.asarray(score, np.float64)
    _, group = np.unique(np.asarray(user), return_inverse=True)
    ranks = _ranks_in_groups(group, scores)
    size = np.bincount(group).astype(np.float64)
    positive = np.bincount(group, labels)
    rank_sum = np.bincount(group, ranks * labels)
    mixed = (positive > 0) & (positive < size)
    if not mixed.any():
        return math.nan
    size, positive, rank_sum = size[mixed], positive[mixed], rank_sum[mixed]
    per_user = (rank_sum - positive * (positive + 1) / 2) / (positive * (size - positive))
    return float((per_user * size).sum() / size.sum())


def _ranks_in_groups(group: NDArray[np.intp], score: Floats) -> Floats:
    """Rank of each score in its own group, from 1; equal scores share the mean of their ranks."""
    order = np.lexsort((score, group))
    g, s = group[order], score[order]
    place = np.arange(len(order), dtype=np.float64)
    new_group = np.diff(g, prepend=-1) != 0
    new_value = new_group | (np.diff(s, prepend=0.0) != 0)
    run = np.cumsum(new_value) - 1
    mean_place = np.bincount(run, place) / np.bincount(run)
    first = place[new_group][np.cumsum(new_group) - 1]
    ranks = np.empty(len(order))
    ranks[order] = mean_place[run] - first + 1
    return ranks


def logloss(label: ArrayLike, logit: ArrayLike) -> float:
    """Mean binary cross entropy, from logits, in float64: `mean(log(1 + exp(z)) - y z)`."""
    y, z = np.asarray(label, np.float64), np.asarray(logit, np.float64)
    return float(np.mean(np.logaddexp(0, z) - y * z))


def entropy(rate: float) -> float:
    """Cross entropy of the constant prediction `rate` for labels of mean `rate`: the unit of NE.

    Raises:
        ValueError: `rate` is not strictly between 0 and 1, where the entropy is 0 and NE undefined.
    """
    if not 0 < rate < 1:
        raise ValueError(f"entropy: rate must lie strictly between 0 and 1, found {rate}")
    return -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
