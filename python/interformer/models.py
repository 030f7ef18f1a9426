"""Models by name, for `--model` and experiments: those of the package, and a user's own as `module:Class`.

All read the same `Batch` and settings. A class of one's own is made as `Class(config, schema)`; a subclass of
`interformer.baselines.WithEvents` has to say only how it reads the history (docs/completejourney.md has one).
"""

from __future__ import annotations

import importlib

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


def find_model(name: str) -> type[nn.Module]:
    """The class of the model called `name`.

    Raises:
        ValueError: there is no such model, or it is no module class.
        ImportError: the module of `module:Class` cannot be imported.
    """
    if name in MODELS:
        return MODELS[name]
    module, _, member = name.partition(":")
    if not module or not member:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, or module:Class; found {name!r}")
    found = getattr(importlib.import_module(module), member, None)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise ValueError(f"model must name a subclass of torch.nn.Module; found {name!r}")
    return found


def build_model(name: str, config: InterFormerConfig, schema: Schema) -> nn.Module:
    """The model called `name`: `Batch -> logits [B]`; it raises what `find_model` does."""
    return find_model(name)(config, schema)
