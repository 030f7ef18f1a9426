"""The personalised feed-forward, for launchers: the call as kernels read it, and memory for its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from interformer_kernels._calls import FfnCall


def viewed(call: FfnCall, view: Callable[[Any], Any]) -> FfnCall:
    """The call with its floating tensors as `view` gives them."""
    return call._replace(x=view(call.x), weight=view(call.weight), bias=view(call.bias))


def empty_gradients(call: FfnCall) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients of `x, weight, bias`; an empty one for a bias that was not given."""
    x, weight, bias = call.x, call.weight, call.bias
    return x.new_empty(x.shape), x.new_empty(weight.shape), x.new_empty((0,) if bias is None else bias.shape)
