"""The baselines compute their papers' formulas, learn all parameters, and their rows are independent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interformer import InterFormerConfig
from interformer.baselines import DIN, LogisticRegression, MeanPooling
from interformer.models import MODELS, build_model, find_model
from interformer.testing import random_batch, rows_of, small_schema
from small_model import assert_equal_sums

CONFIG = InterFormerConfig(
    embed_dim=8, num_heads=2, num_layers=2, interaction_hidden=(6,), head_hidden=(16, 8), max_history=40
)
LENGTHS = (3, 0, 17, 1, 2, 40)
BASELINES = [name for name in MODELS if name != "interformer"]


@pytest.mark.parametrize("lengths", [LENGTHS, (0, 0), ()], ids=["mixed", "all empty", "no rows"])
@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_runs_and_all_parameters_learn(name: str, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = build_model(name, CONFIG, small_schema())
    batch = random_batch(small_schema(), lengths)
    logits = model(batch)
    assert logits.shape == (len(lengths),)
    torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.label, reduction="sum").backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        if lengths is LENGTHS:
            assert parameter.grad.any(), f"{parameter_name} does not reach the loss"


@pytest.mark.parametrize("name", BASELINES)
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    model = build_model(name, CONFIG, small_schema()).double()
    batch = random_batch(small_schema(), LENGTHS)
    batch = replace(batch, dense=batch.dense.double())
    together = model(batch)
    for row in range(len(LENGTHS)):
        torch.testing.assert_close(model(rows_of(batch, [row])), together[row : row + 1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", BASELINES)
def test_candidates_of_a_request_are_scored_as_each_alone(name: str) -> None:
    model = build_model(name, CONFIG, small_schema()).double()
    histories, batch = random_batch(small_schema(), (3, 0, 17)), random_batch(small_schema(), [0] * 6)
    shared = replace(
        batch, dense=batch.dense.double(), sequences=histories.sequences, offsets=histories.offsets,
        rows=torch.tensor([2, 0, 2, 1, 2, 0]),
    )  # fmt: skip
    assert_equal_sums(model(shared), model(shared.unshared()))


@pytest.mark.parametrize("name", BASELINES)
def test_tail_events_of_no_row_change_nothing(name: str) -> None:
    model = build_model(name, CONFIG, small_schema())
    with_tail = random_batch(small_schema(), LENGTHS, tail=7)
    torch.testing.assert_close(model(with_tail), model(replace(with_tail, sequences=with_tail.sequences[:-7])))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", BASELINES)
def test_in_16_bits(name: str, autocast: bool) -> None:
    torch.manual_seed(0)
    model, batch = build_model(name, CONFIG, small_schema()), random_batch(small_schema(), LENGTHS)
    expected = model(batch)
    if not autocast:
        model, batch = model.bfloat16(), replace(batch, dense=batch.dense.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(batch)
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.02)
    logits.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "ordered"), [("bst", True), ("hstu", True), ("din", False), ("mean_pooling", False)])
def test_who_knows_the_order_of_events(name: str, ordered: bool) -> None:
    model = build_model(name, replace(CONFIG, embedding_std=0.5), small_schema())
    batch = random_batch(small_schema(), (9,))
    reversed_events = replace(batch, sequences=batch.sequences.flip(0))
    assert torch.allclose(model(batch), model(reversed_events), rtol=1e-5, atol=1e-6) is not ordered


def test_din_is_a_sum_weighed_by_event_and_candidate() -> None:
    model = DIN(CONFIG, small_schema()).double()
    batch = random_batch(small_schema(), LENGTHS)
    x = model.embedding.tokens(batch)
    events = model.lce(model.embedding.events(batch))
    item, category = x[:, 2], x[:, 3]  # The candidate follows the dense token and the user.
    candidate = model.candidate(torch.cat((item, category), 1))
    pooled = []
    for row in range(len(LENGTHS)):
        e, c = events[batch.offsets[row] : batch.offsets[row + 1]], candidate[row]
        weights = model.weigh(torch.cat((e, c.expand_as(e), e - c, e * c), 1))
        pooled.append((weights * e).sum(0))
    expected = model.head(torch.cat((x.flatten(1), torch.stack(pooled), candidate), 1)).squeeze(1)
    torch.testing.assert_close(model(batch), expected, rtol=1e-10, atol=1e-12)


def test_mean_pooling_is_a_mean() -> None:
    model = MeanPooling(CONFIG, small_schema()).double()
    batch = random_batch(small_schema(), (4, 0))
    x, events = model.embedding.tokens(batch), model.lce(model.embedding.events(batch))
    pooled = torch.stack((events.mean(0), torch.zeros(8, dtype=torch.float64)))
    expected = model.head(torch.cat((x.flatten(1), pooled), 1)).squeeze(1)
    torch.testing.assert_close(model(batch), expected, rtol=1e-10, atol=1e-12)


def test_logistic_regression_is_linear_in_ids() -> None:
    model, batch = LogisticRegression(CONFIG, small_schema()), random_batch(small_schema(), (4, 0))
    for table in model.weights.values():
        torch.nn.init.normal_(table.weight)
    user, item, category = (model.weights[name].weight.flatten() for name in ("user", "item", "category"))
    expected = model.dense(batch.dense).flatten() + user[batch.categorical[:, 0]]
    expected = expected + item[batch.categorical[:, 1]] + category[batch.categorical[:, 2]]
    torch.testing.assert_close(model(batch), expected)


@pytest.mark.parametrize("name", ["din", "bst", "hstu"])
def test_a_schema_that_does_not_say_what_the_candidate_is_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="schema.candidate must name the candidate's fields, found none"):
        build_model(name, CONFIG, replace(small_schema(), candidate=()))


def test_unknown_models_are_named() -> None:
    with pytest.raises(ValueError, match="model must be one of interformer, din, .*; found 'dien'"):
        build_model("dien", CONFIG, small_schema())
    with pytest.raises(ValueError, match="must name a subclass of torch.nn.Module; found 'torch:Tensor'"):
        build_model("torch:Tensor", CONFIG, small_schema())


def test_a_class_of_ones_own_is_a_model() -> None:
    assert find_model("interformer.baselines:DIN") is DIN
