"""Calls of the emulated CUDA kernels, for their tests."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from interformer_kernels import testing

SERVED = list(testing.OPS)


def results(op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients, by name."""
    return testing.evaluate(lambda: testing.call(op, inputs, "cuda"), op, inputs)
