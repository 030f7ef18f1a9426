"""Settings per data set, tuned on validation parts only. `InterFormerConfig`'s own defaults are the paper's sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from interformer.config import InterFormerConfig
from interformer.train import TrainConfig


class Preset(NamedTuple):
    """The default settings of `python -m interformer train`."""

    model: InterFormerConfig
    training: TrainConfig


_SMALL = InterFormerConfig(
    embed_dim=16,
    num_heads=2,
    num_layers=1,
    interaction_hidden=(64,),
    pffn_hidden=(16,),
    head_hidden=(64, 32),
    max_history=50,
)

# Synthetic data has many clicks for few ids, and labels that depend on products of embeddings: large initial
# embeddings and no weight decay.
SYNTHETIC = Preset(
    replace(_SMALL, embedding_std=0.5),
    TrainConfig(epochs=6, lr=5e-3, weight_decay=0.0, embedding_weight_decay=0.0),
)

# MovieLens-100k overfits within two epochs: narrow embeddings, dropout on both sides, weight decay, a halving learning
# rate.
MOVIELENS = Preset(
    replace(_SMALL, embed_dim=8, dropout=0.2, embedding_dropout=0.2),
    TrainConfig(epochs=4, lr=4e-3, lr_decay=0.5, weight_decay=0.5, embedding_weight_decay=1.0),
)
