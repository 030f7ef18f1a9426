"""The launcher of the personalised feed-forward: outputs and gradients as the native calls write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class FfnCall(NamedTuple):
    """What forward and backward are given alike."""

    x: Tensor
    weight: Tensor
    offsets: Tensor
    bias: Tensor | None
    activation: str

    def arguments(self, view: Callable[[Any], Any]) -> tuple[Tensor, Tensor, Tensor, Tensor | None, str]:
        """Of a native call, which takes floating tensors as `view` gives them."""
        return view(self.x), view(self.weight), self.offsets, view(self.bias), self.activation


class FfnGradients(NamedTuple):
    """What a backward writes; no bias, no gradient of it."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


def launcher(
    write: Callable[[FfnCall, Tensor | None, Tensor], None],
    write_gradients: Callable[[FfnCall, Tensor, FfnGradients], None],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of `write(call, residual, out)` and `write_gradients(call, grad_out, gradients)`."""

    def forward(
        x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
    ) -> Tensor:
        """The output `[T, F]`."""
        out = x.new_empty(x.shape[0], weight.shape[2])
        write(FfnCall(x, weight, offsets, bias, activation), residual, out)
        return out

    def backward(
        grad_out: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `x, weight, bias`; an empty one for a bias that was not given."""
        grad_x, grad_weight, grad_bias = (x.new_empty(0 if t is None else t.shape) for t in (x, weight, bias))
        gradients = FfnGradients(grad_x, grad_weight, None if bias is None else grad_bias)
        write_gradients(FfnCall(x, weight, offsets, bias, activation), grad_out, gradients)
        return grad_x, grad_weight, grad_bias

    return forward, backward
