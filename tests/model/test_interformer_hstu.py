"""The HSTU-like baseline is its formula, and a candidate's logit is that of a request with this candidate alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from interformer import InterFormerConfig
from interformer.baselines import HSTU
from interformer.batch import Batch
from interformer.testing import random_batch, small_schema
from small_model import assert_equal_sums
from torch import Tensor
from torch.nn.functional import silu

CONFIG = InterFormerConfig(embed_dim=8, num_heads=2, num_layers=2, head_hidden=(16,), max_history=20, embedding_std=0.5)
LENGTHS = (3, 0, 17)
REQUEST = (2, 0, 2, 1, 2, 0)


def _model() -> HSTU:
    torch.manual_seed(0)
    model = HSTU(CONFIG, small_schema()).double()
    for name, parameter in model.named_parameters():
        if "position" in name:
            torch.nn.init.normal_(parameter)
    return model


def _requests(tail: int = 0) -> Batch:
    """Six candidates of three requests, in no order."""
    histories = random_batch(small_schema(), LENGTHS, tail=tail)
    batch = random_batch(small_schema(), [0] * len(REQUEST))
    return replace(
        batch, dense=batch.dense.double(), sequences=histories.sequences, offsets=histories.offsets,
        rows=torch.tensor(REQUEST),
    )  # fmt: skip


def _one_logit(model: HSTU, batch: Batch, candidate: int) -> Tensor:
    """The logit of one candidate by attention over all pairs of its row, the candidate at the row's end."""
    x = model.embedding.tokens(batch)
    begin, end = batch.offsets[REQUEST[candidate] :][:2]
    events = model.lce(model.embedding.events(batch))[begin:end]
    tokens = torch.cat((events, model.candidate(model.embedding.candidate_of(x))[candidate, None]))
    count, heads, longest = len(tokens), CONFIG.num_heads, CONFIG.max_history + 1
    i = torch.arange(count)
    apart = i[:, None] - i
    for layer in model.layers:
        u, v, q, k = silu(layer.uvqk(layer.norm(tokens))).chunk(4, 1)
        q, k, v = (part.view(count, heads, -1) for part in (q, k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        scores = scores + layer.position.weight[:, apart.clamp(0, longest)]
        a = torch.einsum("hqk,khd->qhd", silu(scores) * (apart >= 0) / longest, v)
        tokens = tokens + layer.out(layer.norm_out(a.flatten(1)) * u)
    return model.head(torch.cat((x[candidate].flatten(), tokens[-1])))


def test_it_is_attention_over_all_pairs_of_the_history_and_one_candidate() -> None:
    model, batch = _model(), _requests(tail=3)
    expected = torch.cat([_one_logit(model, batch, candidate) for candidate in range(len(REQUEST))])
    assert_equal_sums(model(batch), expected)


def test_gradients_are_those_of_requests_with_a_candidate_each() -> None:
    model, batch = _model(), _requests()
    gradients = []
    for each in (batch, batch.unshared()):
        model.zero_grad()
        (model(each) * torch.arange(1, 7)).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for together, apart in zip(*gradients, strict=True):
        assert_equal_sums(together, apart)
