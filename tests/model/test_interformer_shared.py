"""InterFormer once per request: section 8's promises, and the batches and data that carry requests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from interformer import Batch, Field, InterFormer, Schema
from interformer.data import SyntheticLaw, synthesize
from interformer.data.balance import balanced, cost_of
from interformer.data.clicks import Clicks
from interformer.interaction import InteractionArch
from interformer.layers import SharedTokens
from interformer.models import MODELS, build_model
from interformer.testing import random_batch, small_schema
from interformer.train import Progress, Run, TrainConfig
from small_model import SMALL, assert_equal_sums
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

SHARED = replace(SMALL, shared="request")
SCHEMA = replace(small_schema(), candidate_dense=("dense_1",))
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "dot": {"backbone": "dot", "num_queries": 3},
    "dcnv2": {"backbone": "dcnv2", "backbone_layers": 3},
    "dhen-2": {"backbone_layers": 2},
    "literal": {"literal": True},
    "mean, no CLS": {"summary": "mean", "cls": False},
    "no PFFN": {"pffn": "none"},
    "reference": {"backend": "reference"},
}
LENGTHS = (3, 0, 17, 1)
ROWS = (2, 0, 2, 1, 3, 2, 0, 2)
each_form = pytest.mark.parametrize("form", FORMS)


def requests(rows: tuple[int, ...] = ROWS, seed: int = 0, tail: int = 0) -> Batch:
    """Impressions of requests, which agree in what is not the candidate's."""
    histories, of = random_batch(SCHEMA, LENGTHS, seed, tail), torch.tensor(rows)
    candidates = random_batch(SCHEMA, (0,) * len(rows), seed + 1)
    dense, categorical = candidates.dense.clone(), candidates.categorical.clone()
    dense[:, 0], categorical[:, 0] = histories.dense[of, 0], histories.categorical[of, 0]
    user = categorical[:, 0]
    return Batch(dense, categorical, histories.sequences, histories.offsets, candidates.label, user, of)


def made(form: str = "default", **settings: Any) -> InterFormer:
    torch.manual_seed(0)
    return InterFormer(replace(SHARED, **FORMS[form], **settings), SCHEMA).double()


def selected(batch: Batch, impressions: Tensor) -> Batch:
    """Some impressions, over all histories."""
    assert batch.rows is not None
    names = ("dense", "categorical", "label", "user", "rows")
    return replace(batch, **{name: getattr(batch, name)[impressions] for name in names})


# ---------------------------------------------------------------- the model


@each_form
def test_all_parameters_learn(form: str) -> None:
    model, batch = made(form), requests()
    binary_cross_entropy_with_logits(model(batch), batch.label.double()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@each_form
def test_a_logit_does_not_depend_on_other_candidates(form: str) -> None:
    """Bit for bit, whoever the others are; and a request's candidates at once are each of them alone."""
    model, batch = made(form).float().eval(), requests()
    others = requests(seed=5)
    kept = torch.tensor([0, 3, 6])
    changed = replace(batch, **{name: getattr(batch, name).clone() for name in ("dense", "categorical")})
    rest = torch.tensor([i for i in range(len(batch)) if i not in kept])
    changed.dense[rest, 1], changed.categorical[rest, 1:] = others.dense[rest, 1], others.categorical[rest, 1:]
    with torch.no_grad():
        logits, logits_of_changed = model(batch), model(changed)
        assert torch.equal(logits[kept], logits_of_changed[kept])
        assert not torch.equal(logits[rest], logits_of_changed[rest])
        inputs = model.embedding.request_inputs(batch)
        state = model.read_requests(*inputs, batch.sequences, batch.offsets)
        for i in range(len(batch)):
            alone = selected(batch, torch.tensor([i]))
            found = model.score(state, *model.embedding.candidate_inputs(alone), alone.request_of_each())
            torch.testing.assert_close(found, logits[i : i + 1])


@each_form
def test_sharing_changes_neither_logits_nor_gradients(form: str) -> None:
    """As if each candidate came with a request of its own, and wherever it stands in the batch."""
    model, batch = made(form), requests(tail=3)
    grads: list[dict[str, Tensor]] = []
    order = torch.randperm(len(batch))
    for given, back in (
        (batch, slice(None)),
        (batch.unshared(), slice(None)),
        (replace(batch.unshared(), rows=torch.arange(len(batch))), slice(None)),
        (selected(batch, order), order.argsort()),
    ):
        model.zero_grad()
        logits = model(given)
        binary_cross_entropy_with_logits(logits, given.label.double()).backward()
        assert_equal_sums(logits[back], model(batch))
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for found in grads[1:]:
        assert found.keys() == grads[0].keys()
        for name, grad in found.items():
            assert_equal_sums(grad, grads[0][name])


@pytest.mark.parametrize("backbone", ["dot", "dcnv2", "dhen"])
def test_what_requests_compute_once_is_the_interaction_of_all_tokens(backbone: str) -> None:
    torch.manual_seed(0)
    config = replace(SHARED, backbone=backbone, backbone_layers=1)
    arch = InteractionArch(config, num_tokens=3, num_summary=6).double()
    z = SharedTokens(torch.randn(5, 4, 8).double(), torch.randn(2, 5, 8).double(), torch.tensor([1, 0, 1, 1, 0]))
    assert_equal_sums(arch.shared(z), arch(z.all(), None))


@pytest.mark.parametrize(
    ("settings", "schema", "match"),
    [
        ({"flow": "s2n"}, SCHEMA, "flow must be 'int' where the request is shared, found 's2n'"),
        ({"shared": "user"}, SCHEMA, "shared must be one of none, request; found 'user'"),
        ({"num_queries": 0}, SCHEMA, "num_queries"),
        ({}, replace(small_schema(0), candidate=()), "Schema.candidate must name a field"),
        ({}, replace(small_schema(0), candidate=("user", "item", "category")), "must leave a field to the request"),
    ],
)
def test_what_it_refuses(settings: dict[str, Any], schema: Schema, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        InterFormer(replace(SHARED, **settings), schema)


def test_an_unshared_model_has_no_halves() -> None:
    model, batch = InterFormer(replace(SHARED, shared="none"), SCHEMA), requests()
    with pytest.raises(ValueError, match="read_requests: config.shared must be 'request', found 'none'"):
        model.read_requests(batch.dense, batch.categorical, batch.sequences, batch.offsets)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_reads_batches_of_requests(name: str) -> None:
    torch.manual_seed(0)
    model, batch = build_model(name, replace(SHARED, shared="none"), SCHEMA).double(), requests(tail=2)
    assert_equal_sums(
        model(replace(batch, dense=batch.dense.double())), model(replace(batch.unshared(), dense=batch.dense.double()))
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_field_may_have_any_name(name: str) -> None:
    """Names of attributes of modules, and of nothing at all."""
    fields = tuple(Field(text, text) for text in ("type", "forward", "", "a.b", "weight", "training", "item"))
    schema = Schema({field.table: 7 for field in fields}, ("type",), fields, fields, candidate=("type", "forward"))
    for shared in ("none", "request") if name == "interformer" else ("none",):
        model = build_model(name, replace(SHARED, shared=shared), schema)
        assert model(random_batch(schema, (3, 0))).shape == (2,)


def test_gradients_of_many_candidates_are_not_lost_in_16_bits() -> None:
    shared = torch.ones(1, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    z = SharedTokens(torch.zeros(1000, 1, 8), shared, torch.zeros(1000, dtype=torch.int64))
    z.take(shared).backward(torch.ones(1000, 4, 8, dtype=torch.bfloat16))
    assert shared.grad is not None
    assert (shared.grad == 1000).all()


@pytest.mark.parametrize("side", ["dense", "categorical"])
def test_columns_of_another_schema_are_named(side: str) -> None:
    model, batch = made(), requests()
    wide = {side: torch.cat((getattr(batch, side),) * 2, 1)}
    with pytest.raises(ValueError, match=f"batch.{side} must have one column for each of .*; found shape"):
        model(replace(batch, **wide))
    state = model.read_requests(*model.embedding.request_inputs(batch), batch.sequences, batch.offsets)
    with pytest.raises(ValueError, match="candidate's dense must have one column for each of dense_1; found shape"):
        model.score(state, batch.dense, batch.categorical, batch.request_of_each())


# ---------------------------------------------------------------- batches


def test_a_shared_batch_is_moved_and_overwritten_as_others() -> None:
    batch, other = requests().with_capacity(60), requests(seed=3)
    assert torch.equal(batch.copy_(other).rows, other.rows)
    assert batch.to("meta").rows.is_meta
    with pytest.raises(ValueError, match="batch.rows must be given, found None"):
        batch.copy_(other.unshared())
    first = requests().first_impressions()
    assert first.tolist() == [1, 3, 0, 4]


# ---------------------------------------------------------------- data


def clicks() -> Clicks:
    """Eight impressions of four requests; those of a request share a history."""
    batch = requests()
    assert batch.rows is not None
    first, last = batch.offsets[batch.rows], batch.offsets[batch.rows + 1]
    return Clicks(
        SCHEMA, batch.dense, batch.categorical, batch.sequences, first, last, batch.label, batch.user,
        torch.tensor([70, 10, 40, 30])[batch.rows],
    )  # fmt: skip


def test_clicks_of_one_request_share_a_history() -> None:
    batch = clicks().batch(torch.arange(8))
    assert batch.offsets.diff().tolist() == [17, 3, 0, 1]  # in the order of their first impressions
    assert batch.rows is not None
    assert batch.rows.tolist() == [0, 1, 0, 2, 3, 0, 1, 0]
    unshared, wanted = batch.unshared(), requests().unshared()
    assert torch.equal(unshared.sequences, wanted.sequences)
    assert torch.equal(unshared.offsets, wanted.offsets)


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_batches_keep_requests_together(seed: int | None, size: int) -> None:
    data = clicks()
    rows = data.batch_rows(size, seed=seed, pool=2)
    assert torch.cat(rows).sort().values.tolist() == list(range(8))
    for part in rows:
        held = data.request[part]
        assert all((held == request).sum() == (data.request == request).sum() for request in held.unique())
        assert len(part) <= size or len(held.unique()) == 1
        assert (data.batch(part).rows.diff() >= 0).all()


def test_shuffled_histories_stay_shared() -> None:
    shuffled = clicks().with_shuffled_history(0)
    assert shuffled.batch(torch.arange(8)).offsets.diff().tolist() == [17, 3, 0, 1]
    assert torch.equal(shuffled.lengths, clicks().lengths)


@pytest.mark.parametrize("shared", ["none", "request"])
def test_training_on_requests(shared: str) -> None:
    """Impressions of a synthetic user as one request; both forms train, and a run repeats."""
    splits = synthesize(SyntheticLaw(num_users=20, impressions_per_user=4, mean_length=8, max_history=12))
    parts = {name: replace(part, request=torch.arange(len(part)) // 3) for name, part in splits.parts().items()}
    for name, part in parts.items():  # those of a request have its first one's history
        first = torch.arange(len(part)) // 3 * 3
        dense = torch.where(torch.tensor(True), part.dense[first], part.dense)
        parts[name] = replace(part, first=part.first[first], last=part.last[first], dense=dense)
    config = replace(SHARED, shared=shared, max_history=12)
    runs = [Run(replace(splits, **parts), config, TrainConfig(epochs=1, batch_size=16)) for _ in range(2)]
    losses = []
    for run in runs:
        losses.append(run.train_epoch(Progress()).loss)
    assert losses[0] == losses[1]
    assert 0 < losses[0] < 1.5


# ---------------------------------------------------------------- shares of nearly equal cost


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_shares_of_heavy_tailed_rows_cost_nearly_the_same(parts: int) -> None:
    lengths = torch.exp(torch.randn(256, generator=torch.Generator().manual_seed(0)) * 1.5 + 4).long()
    costs = cost_of(lengths)
    shares = balanced(costs, parts)
    assert torch.cat(shares).sort().values.tolist() == list(range(256))
    totals = torch.stack([costs[share].sum() for share in shares])
    assert totals.max() <= max(1.02 * totals.mean(), costs.max())
    assert all((share.diff() > 0).all() for share in shares)


def test_clicks_are_split_by_cost_and_by_request() -> None:
    data = clicks()
    shares = data.split(torch.tensor([0, 2, 5, 7, 1, 6, 3, 4]), 2)
    assert [sorted(data.request[share].unique().tolist()) for share in shares] == [[40], [10, 30, 70]]
    assert data.split(torch.arange(8), 1)[0].tolist() == list(range(8))
    assert [len(share) for share in replace(data, request=None).split(torch.arange(1), 3)] == [1, 0, 0]
