"""Registry of models, for `--model` and experiments. All read the same `Batch` and settings."""

from __future__ import annotations

from torch import nn

from interformer.baselines import BST, DIN, HSTU, LogisticRegression, MeanPooling
from interformer.config import InterFormerConfig
from interformer.model import InterFormer
from interformer.schema import Schema

MODELS: dict[str, type[nn.Module]] = {
    "interformer": InterFormer,
    "din": DIN,
    "bst": BST,
    "hstu": HSTU,
    "mean_pooling": MeanPooling,
    "logistic_regression": LogisticRegression,
}


def build_model(name: str, config: InterFormerConfig, schema: Schema) -> nn.Module:
    """The model called `name`: `Batch -> logits [B]`.

    Raises:
        ValueError: there is no such model.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}; found {name!r}")
    return MODELS[name](config, schema)
