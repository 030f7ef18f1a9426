"""The fast backend trains as the reference does: the same losses, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from grid import backends
from interformer import InterFormerConfig
from interformer.data import SyntheticLaw, synthesize
from interformer.train import Progress, TrainConfig, train

from interformer_kernels.testing import OPS

STEPS = 100
TRAINING = TrainConfig(epochs=1, batch_size=16, lr=5e-3, weight_decay=0.1, embedding_weight_decay=0.1)
MODEL = InterFormerConfig(
    embed_dim=8,
    num_heads=2,
    num_layers=1,
    cross_rank=4,
    interaction_hidden=(8,),
    pffn_hidden=(8,),
    pffn_inner=8,
    head_hidden=(8,),
    dropout=0.1,
    embedding_dropout=0.1,
    embedding_std=0.5,
    max_history=12,
)


class Losses(Progress):
    """The loss of every step."""

    def __init__(self) -> None:
        self.recorded: list[float] = []

    def step(self, impressions: int, tokens: int, loss: float) -> None:
        self.recorded.append(loss)


def _losses(config: InterFormerConfig) -> list[float]:
    # Four fifths of the users are in the training part.
    users = STEPS * TRAINING.batch_size // 4
    law = SyntheticLaw(num_users=users, impressions_per_user=5, mean_length=6, max_history=config.max_history)
    losses = Losses()
    train(synthesize(law), config, TRAINING, progress=losses)
    assert len(losses.recorded) == STEPS
    return losses.recorded


SERVING = set.intersection(*(set(backends(op)) for op in OPS)) - {"reference"}


@pytest.mark.parametrize("pffn", ["mlp", "gdpa"])
@pytest.mark.parametrize("backend", sorted(SERVING))
def test_a_backend_gives_the_references_losses(backend: str, pffn: str) -> None:
    """Float32, one seed, 100 steps: losses agree within the 1e-4 that the project promises."""
    fast, reference = (_losses(replace(MODEL, pffn=pffn, backend=name)) for name in (backend, "reference"))
    assert max(abs(a - b) for a, b in zip(fast, reference, strict=True)) <= 1e-4
    assert fast != reference  # Different bits show that two backends were used.
