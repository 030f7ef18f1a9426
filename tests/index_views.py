"""Calls whose index tensors (offsets, positions) are views: every second number of a tensor, or one many times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from interformer_kernels.testing import Case

_SMALL: dict[str, Any] = {"heads": 1, "kv_heads": 1, "head_size": 4, "value_size": 4}
CASES = [
    Case(
        "jagged_attention", "cross, positions", lengths=(3, 20), query_lengths=(4, 2), rope=4, positions=True, **_SMALL
    ),
    Case("pma_pooling", "plain", lengths=(3, 5), **_SMALL),
    Case("gated_cross_attention", "dense queries", lengths=(3, 5), **_SMALL),
    Case("gated_cross_attention", "jagged queries", lengths=(3, 5), query_lengths=(2, 1), gate="head", **_SMALL),
    Case("apply_rotary", "positions", lengths=(3, 5), rope=4, positions=True, **_SMALL),
    Case("personalized_ffn", "silu", lengths=(3, 5), options={"activation": "silu"}, **_SMALL),
    Case("jagged_softmax", "scores", lengths=(3, 5), **_SMALL),
    Case("jagged_weighted_sum", "values", lengths=(3, 5), **_SMALL),
]
_OFFSETS = ("offsets", "kv_offsets", "q_offsets")


def spread(x: Tensor) -> Tensor:
    """The same numbers, with others between them."""
    return torch.stack((x, x + 1), 1).flatten()[::2]


def repeated(x: Tensor) -> Tensor:
    """The first number in every place, by a stride of 0."""
    return x[:1].expand(len(x))


def with_indices(
    inputs: dict[str, Any], offsets: Callable[[Tensor], Tensor], positions: Callable[[Tensor], Tensor]
) -> Any:
    """The call with its index tensors changed."""
    changed = dict(inputs)
    for name in _OFFSETS:
        if inputs.get(name) is not None:
            changed[name] = offsets(inputs[name])
    if "positions" in inputs:
        changed["positions"] = positions(inputs["positions"])
    if "rope_positions" in inputs:
        changed["rope_positions"] = tuple(map(positions, inputs["rope_positions"]))
    return changed


def pairs(inputs: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A call on views, and the same call on contiguous tensors."""
    views = [with_indices(inputs, spread, spread), with_indices(inputs, lambda x: x, repeated)]
    return [(view, with_indices(view, Tensor.contiguous, Tensor.contiguous)) for view in views]
