"""Rotary embedding: the launcher of a backend, from the function that turns heads forwards or backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def launcher(rotated: Callable[..., Tensor]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`forward` and `backward` in the schema's order."""

    def forward(
        x: Tensor, offsets: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
    ) -> Tensor:
        """The output `[T, H, D]`."""
        return rotated(x, offsets, cos, sin, positions, interleaved, backwards=False)

    def backward(
        grad_out: Tensor,
        x: Tensor,
        offsets: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        interleaved: bool,
    ) -> Tensor:
        """The gradient of `x`: the output's, turned back."""
        return rotated(grad_out, offsets, cos, sin, positions, interleaved, backwards=True)

    return forward, backward
