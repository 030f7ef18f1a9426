"""FLOPs of a candidate: exact where they can be counted by hand, and shared where a request is read once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interformer.costs import flops_per_candidate
from interformer.data import SyntheticLaw, synthesize
from interformer.data.clicks import Clicks
from interformer.models import build_model
from interformer.schema import Schema
from small_model import SMALL


def _clicks() -> Clicks:
    """Impressions, two of a request, with histories of about 30 events."""
    clicks = synthesize(SyntheticLaw(num_users=20, impressions_per_user=2, mean_length=30.0, max_history=40)).train
    first = torch.arange(len(clicks)) // 2 * 2
    return replace(clicks.select(first), request=first)


def _flops(name: str, clicks: Clicks, candidates: int, shared: str = "none") -> float:
    return flops_per_candidate(build_model(name, replace(SMALL, shared=shared), clicks.schema), clicks, candidates)


def test_of_a_linear_map() -> None:
    clicks = _clicks()
    schema: Schema = clicks.schema
    assert (
        _flops("logistic_regression", clicks, 1) == _flops("logistic_regression", clicks, 100) == 2 * len(schema.dense)
    )


def test_of_the_median_history() -> None:
    clicks = _clicks()
    length = int(clicks.lengths.sort().values[len(clicks) // 2])
    width, fields = SMALL.embed_dim, len(clicks.schema.sequences)
    flops = _flops("mean_pooling", clicks, 1), _flops("mean_pooling", clicks.without_history(), 1)
    assert flops[0] - flops[1] >= 2 * length * fields * width * width > 0


@pytest.mark.parametrize(("name", "shared"), [("interformer", "request"), ("hstu", "none")])
def test_a_request_that_is_read_once_is_divided_among_its_candidates(name: str, shared: str) -> None:
    clicks = _clicks()
    alone, together = (_flops(name, clicks, candidates, shared) for candidates in (1, 100))
    assert alone > 2 * together
    apart = replace(clicks, request=None)
    # Products of parameters alone, such as seeds and projections, are of a whole batch.
    assert _flops(name, apart, 100, shared) == pytest.approx(_flops(name, apart, 1, shared), rel=0.02)


@pytest.mark.parametrize("name", ["interformer", "din", "bst"])
def test_others_read_a_history_for_each_candidate(name: str) -> None:
    clicks = _clicks()
    assert _flops(name, clicks, 100) == pytest.approx(_flops(name, clicks, 1), rel=0.02)
