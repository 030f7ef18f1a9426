"""Batches of different lengths in the same memory: steps, losses and gradients are those of the batches alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interformer import InterFormer, InterFormerConfig
from interformer.batch import Batch
from interformer.testing import random_batch, small_schema
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
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "rank": {"pffn": "rank"},
    "two_layer": {"pffn": "two_layer"},
    "gdpa": {"pffn": "gdpa"},
    "literal, no cls": {"literal": True, "cls": False},
    "mab": {"pma": "mab", "num_seeds": 1},
    "mean": {"summary": "mean"},
    "mha, window": {"summary": "mha", "window": (2, 1)},
}
# Each has four rows; the second and third leave events of earlier batches behind their own.
BATCHES = ((3, 0, 17, 40), (1, 2, 0, 5), (0, 0, 0, 0), (12, 9, 14, 2))
CAPACITY = 64


def _batches() -> list[Batch]:
    return [random_batch(small_schema(), lengths, seed) for seed, lengths in enumerate(BATCHES)]


def _step(model: InterFormer, batch: Batch, optimizer: torch.optim.Optimizer) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(model(batch), batch.label.double())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _trained(config: InterFormerConfig, batches: Sequence[Batch], static: Batch | None) -> dict[str, Tensor]:
    """Losses, last gradients and trained parameters; each batch is copied into `static` where there is one."""
    torch.manual_seed(0)
    model = InterFormer(config, small_schema()).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True, capturable=True)
    losses = [_step(model, static.copy_(batch) if static else batch, optimizer) for batch in batches]
    result = {"losses": torch.stack(losses)}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        result |= {name: parameter.detach(), f"gradient of {name}": parameter.grad}
    return result


@pytest.mark.parametrize("form", FORMS)
def test_training_in_a_batch_of_fixed_capacity_is_training(form: str) -> None:
    config, batches = replace(SMALL, **FORMS[form]), _batches()
    static = batches[0].with_capacity(CAPACITY)
    static.sequences[60:] = 1  # ids of nobody
    found, wanted = _trained(config, batches, static), _trained(config, batches, None)
    # float64: products of more events round differently, which Adam's division enlarges for gradients near 0.
    for name, x in found.items():
        torch.testing.assert_close(
            x, wanted[name], rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_capacity_adds_events_of_no_row() -> None:
    batch = _batches()[0]
    larger = batch.with_capacity(CAPACITY)
    assert larger.sequences.shape == (CAPACITY, 3)
    assert torch.equal(larger.sequences[:60], batch.sequences)
    assert not larger.sequences[60:].any()
    same = batch.with_capacity(60)
    for name, x in batch.tensors().items():
        assert torch.equal(getattr(same, name), x)
        assert getattr(same, name).data_ptr() != x.data_ptr()
    with pytest.raises(ValueError, match="tokens must be at least the batch's 60 events, found 59"):
        batch.with_capacity(59)
    with pytest.raises(TypeError, match="tokens must be an int"):
        batch.with_capacity(64.0)  # type: ignore[arg-type]


def test_copies_keep_memory_and_refuse_other_sizes() -> None:
    first, second, *_ = _batches()
    static = first.with_capacity(CAPACITY)
    places = {name: x.data_ptr() for name, x in static.tensors().items()}
    assert static.copy_(second) is static
    assert {name: x.data_ptr() for name, x in static.tensors().items()} == places
    for name, x in second.tensors().items():
        assert torch.equal(getattr(static, name)[: len(x)], x)
    assert torch.equal(static.sequences[8:60], first.sequences[8:])
    before = static.label.clone()
    for wrong, message in (
        (random_batch(small_schema(), (1, 2, 3)), r"batch.dense must have shape \[4, 2\], found \[3, 2\]"),
        (random_batch(small_schema(), (65, 0, 0, 0)), r"at most 64 events, shape \[64, 3\], found \[65, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            static.copy_(wrong)
    assert torch.equal(static.label, before)
