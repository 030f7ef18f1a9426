"""The launcher of the personalised feed-forward: outputs and gradients as the native calls write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def launcher(
    write: Callable[..., None], write_gradients: Callable[..., None]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of `write(x, weight, offsets, bias, activation, residual, out)` and
    `write_gradients(x, weight, offsets, bias, activation, grad_out, grad_x, grad_weight, grad_bias)`.
    """

    def forward(
        x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
    ) -> Tensor:
        """The output `[T, F]`."""
        out = x.new_empty(x.shape[0], weight.shape[2])
        write(x, weight, offsets, bias, activation, residual, out)
        return out

    def backward(
        grad_out: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `x, weight, bias`; an empty one for a bias that was not given."""
        grad_x, grad_weight, grad_bias = (x.new_empty(0 if t is None else t.shape) for t in (x, weight, bias))
        given = None if bias is None else grad_bias
        write_gradients(x, weight, offsets, bias, activation, grad_out, grad_x, grad_weight, given)
        return grad_x, grad_weight, grad_bias

    return forward, backward
