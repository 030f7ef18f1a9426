"""Tensors of a case: drawn, and cut to one row of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interformer_kernels.testing.case import Case
from interformer_kernels.testing.draw import Draw, offsets_of
from interformer_kernels.testing.ops import make_arguments


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of the case's public function, gradient leaves included, and the output's `grad_out`, with the
    log-sum-exp's `grad_lse` where the case has one."""
    draw = Draw(case, dtype, device, seed)
    inputs, shape, rows = make_arguments(draw, case, offsets_of(case.lengths, case.index_dtype, device))
    made = {**case.options, **inputs, "grad_out": draw.leaf(*shape, rows=rows, gradient=False)}
    if case.grad_lse:
        made["grad_lse"] = draw.leaf(*shape[:-1], rows=rows, gradient=False)
    return made


def row_of(x: Tensor, lengths: Sequence[int], b: int, end: int | None = None) -> Tensor:
    """The part of a tensor of rows, or of their tokens, that belongs to row `b`, or to rows `b .. end - 1`."""
    end = b + 1 if end is None else end
    first = sum(lengths[:b])
    return x[b:end] if x.shape[0] == len(lengths) else x[first : first + sum(lengths[b:end])]


def alone(inputs: Mapping[str, Any], lengths: Sequence[int], b: int, end: int | None = None) -> dict[str, Any]:
    """The call of row `b` of a batch (of rows `b .. end - 1`) by itself.

    Tensors of rows and tokens are cut, all else is shared.
    """
    cut = dict(inputs)
    for name, x in inputs.items():
        if name in ("offsets", "kv_offsets"):
            cut[name] = offsets_of(lengths[b : b + 1 if end is None else end], x.dtype, str(x.device))
        elif _of_rows(name, x, inputs):
            cut[name] = row_of(x.detach(), lengths, b, end).requires_grad_(x.requires_grad)
    return cut


def _of_rows(name: str, x: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether an argument has something for every row, or every token of theirs."""
    if name == "gate":  # may be of the output's shape up to sizes of 1, or broadcast over rows and tokens
        return x is not None and x.dim() == inputs["grad_out"].dim()
    of_rows = ("q", "k", "v", "x", "weight", "bias", "scores", "weights", "residual", "grad_out", "grad_lse")
    return isinstance(x, Tensor) and name in (*of_rows, "num_targets", "times")
