"""Calls of `gated_cross_attention` whose query rows share rows of keys, for the tests of each backend."""

from __future__ import annotations

from typing import Any

import torch

from interformer_kernels import gated_cross_attention, testing
from interformer_kernels.testing import Case

ROWS = (2, 0, 2, 1, 4, 2, 2, 3, 0, 4)
SIZES: dict[str, Any] = {"lengths": (5, 0, 37, 1, 90), "kv_heads": 2, "queries": 2}


def made(dtype: torch.dtype = torch.float32, **fields: Any) -> dict[str, Any]:
    """Arguments of a call."""
    inputs = testing.make_inputs(Case("gated_cross_attention", "", **{**SIZES, "kv_rows": ROWS, **fields}), dtype)
    inputs.pop("grad_out")
    return inputs


def call(inputs: dict[str, Any], **changed: Any) -> Any:
    """The call, with some arguments changed."""
    return gated_cross_attention(**{**inputs, **changed})


def check_same_bits(backend: str, dtype: torch.dtype, times: int = 9, **fields: Any) -> None:
    """A query's output is the same alone and among many, in any order: 1, 9 and 90 queries take other paths."""
    inputs = made(dtype, kv_rows=times * ROWS, queries=1, gate="full", residual=True, **fields)
    out, lse = call(inputs, return_lse=True, backend=backend)
    everyone = list(range(times * len(ROWS)))
    for rows in ([0], [4, 9, 2], everyone[::3], everyone[::-1]):
        some = {name: inputs[name][rows] for name in ("q", "kv_rows", "gate", "residual")}
        found, found_lse = call(inputs, **some, return_lse=True, backend=backend)
        assert torch.equal(found, out[rows])
        assert torch.equal(found_lse, lse[rows])
