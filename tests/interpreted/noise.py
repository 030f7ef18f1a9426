"""The errors of a GPU's fast instructions, added to Triton's interpreter, whose own results are correctly rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder

# The largest errors that NVIDIA documents: ex2.approx, relative; div.full, in units of the last place.
_EXP2_ERROR = 2.0**-22
_DIVISION_ERROR = 2.0


def put_noise(patch: pytest.MonkeyPatch, seed: int = 0) -> list[int]:
    """Until the patch is undone: noise of up to the largest documented error, uniform, on exponentials and `/`.

    `tl.div_rn`, logarithms, square roots and the error function are not such instructions. Returns a list that
    gets an entry for each noisy tile: its number of elements.
    """
    generator = np.random.default_rng(seed)
    noisy: list[int] = []

    def uniform(x: np.ndarray) -> Any:
        noisy.append(x.size)
        return generator.uniform(-1, 1, x.shape)

    def exponential(function: Any) -> Any:
        def noisy_exponential(x: np.ndarray) -> np.ndarray:
            y = function(x.astype(np.float64)) * (1 + _EXP2_ERROR * uniform(x))
            # Results below the normal numbers are flushed.
            return np.where(y < np.finfo(np.float32).tiny, 0.0, y).astype(x.dtype)

        return lambda builder, x: builder.unary_op(x, noisy_exponential)

    def quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        exact = np.divide(x, y)
        return (exact + _DIVISION_ERROR * np.spacing(np.abs(exact)) * uniform(exact)).astype(exact.dtype)

    patch.setattr(InterpreterBuilder, "create_exp2", exponential(np.exp2))
    patch.setattr(InterpreterBuilder, "create_exp", exponential(np.exp))
    patch.setattr(InterpreterBuilder, "create_fdiv", lambda builder, x, y: builder.binary_op(x, y, quotient))
    return noisy
