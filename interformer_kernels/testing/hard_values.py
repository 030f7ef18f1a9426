"""Numbers that cancel, overflow or vanish: what they change in a call, and the options that make it hard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


def pointwise(score: str) -> dict[str, Any]:
    """Options of a pointwise score."""
    return {"score": score, "post_scale": 0.125}


def _scaled(inputs: Inputs, **factors: float) -> Inputs:
    """The inputs with some multiplied by a number."""
    changed = dict(inputs)
    for name, factor in factors.items():
        if isinstance(inputs.get(name), Tensor):
            changed[name] = (inputs[name].detach() * factor).requires_grad_(inputs[name].requires_grad)
    return changed


def _one_hot(inputs: Inputs) -> Inputs:
    return {**inputs, "scale": 20.0}


def _equal_scores(inputs: Inputs) -> Inputs:
    """All keys of all rows are the first one."""
    k = inputs["k"].detach()
    return {**inputs, "k": k[:1].expand_as(k).contiguous().requires_grad_()} if len(k) else inputs


def _million(inputs: Inputs) -> Inputs:
    """Equal scores of about a million: the rounding of their log-sum-exp is larger than its logarithm's differences."""
    return _scaled(_equal_scores(inputs), q=1e3, seeds=1e3, k=1e3)


def _largest(inputs: Inputs) -> Inputs:
    """Values of the dtype's largest numbers, all of one sign: their mean is one of them."""
    name = "v" if isinstance(inputs.get("v"), Tensor) else "k"
    x = inputs[name].detach()
    return {**inputs, name: x.sign().abs().mul(0.99 * torch.finfo(x.dtype).max).requires_grad_()}


def _far_apart(inputs: Inputs) -> Inputs:
    """Keys near the dtype's largest number beside small queries: sums for dQ overflow but for the small `scale`."""
    # The yardstick of float64 is float32.
    size = min(torch.finfo(inputs["k"].dtype).max, torch.finfo(torch.float32).max) / 8
    # Float16 has no room for products beyond its largest number, which `scale` would bring back.
    small, values = (1e6 / size, 1e3) if size > 1e30 else (0.01, 1.0)
    return {**_scaled(inputs, k=size, q=small, seeds=small, v=values), "scale": 1 / (size * small)}


def _hidden(inputs: Inputs) -> Inputs:
    """Every third score is -inf, and all of the first tokens', which are whole rows."""
    scores = inputs["scores"].detach().clone()
    scores[::3] = -torch.inf
    scores[:4] = -torch.inf
    return {**inputs, "scores": scores.requires_grad_()}


# Few queries have two keys of nearly the largest score: they carry the whole error of a gradient. Only over many such
# queries is its ratio to eager PyTorch's no matter of luck.
LARGE_SCORES = "scores of hundreds"
_SOFTMAX: tuple[dict[str, Any], ...] = ({},)
_ALL_SCORES = (*_SOFTMAX, pointwise("gelu"), pointwise("silu"))
_TANH, _SIGMOID, _SILU = ({"gate_activation": activation} for activation in ("tanh", "sigmoid", "silu"))
_SELF: dict[str, Any] = {"gate_form": "self"}
# By name: the change of a case's inputs, and the options that make it hard.
HARD_VALUES: dict[str, tuple[Callable[[Inputs], Inputs], tuple[dict[str, Any], ...]]] = {
    "gates of 1e-6": (lambda inputs: _scaled(inputs, gate=1e-6), (_TANH, {**_SELF, **_TANH}, {**_SELF, **_SILU})),
    "gates of 1e-3": (lambda inputs: _scaled(inputs, gate=1e-3), (_TANH, {**_SELF, **_TANH}, _SILU)),
    "gates of 100": (lambda inputs: _scaled(inputs, gate=100.0), (_SIGMOID, _TANH, {**_SELF, **_SIGMOID})),
    "equal scores": (_equal_scores, _ALL_SCORES),
    "one-hot softmax": (_one_hot, _SOFTMAX),
    "scores of 1e6": (_million, _SOFTMAX),
    "largest values": (_largest, _SOFTMAX),
    "keys near the largest": (_far_apart, _ALL_SCORES),
    "inputs of 1e-3": (lambda inputs: _scaled(inputs, q=1e-3, seeds=1e-3, k=1e-3, v=1e-3, x=1e-3), _ALL_SCORES),
    # Only `jagged_softmax` takes these.
    "scores of -inf": (_hidden, ()),
    "scores of tens": (lambda inputs: _scaled(inputs, scores=30.0), ()),
    LARGE_SCORES: (lambda inputs: inputs, ({"scale": 20.0}, {"scale": -20.0})),
}
