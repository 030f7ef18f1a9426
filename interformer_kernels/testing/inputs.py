"""Tensors of a case: drawn, and cut to one row of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interformer_kernels.testing.grid import Case


def offsets_of(lengths: Sequence[int], dtype: torch.dtype = torch.int64, device: str = "cpu") -> Tensor:
    """Offsets `[B+1]` of rows of these lengths."""
    ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return ends.to(device, dtype)


def rotary_tables(length: int, channels: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """The tables `(cos, sin)`, float32 `[length, channels/2]`, of the usual rotary embedding."""
    frequency = base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


# Larger tensors are drawn on the GPU that they are for: one thread of the CPU takes 20 ns for each of their numbers.
MOST_DRAWN_ON_CPU = 1 << 20


class Numbers:
    """Random numbers for tensors on a device, from one seed.

    Up to `MOST_DRAWN_ON_CPU` of them are drawn on the CPU in float64, and are the same for every device; more, for a
    GPU, are drawn there, in float32.
    """

    def __init__(self, device: str, seed: int) -> None:
        self.device, self.seed = device, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.on_device: torch.Generator | None = None

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Normal numbers, on the device or on the CPU."""
        if math.prod(shape) <= MOST_DRAWN_ON_CPU or not self.draws():
            return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)
        if self.on_device is None:
            self.on_device = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randn(tuple(shape), generator=self.on_device, dtype=torch.float32, device=self.device)

    def draws(self) -> bool:
        """Whether the device draws numbers itself."""
        return torch.device(self.device).type == "cuda"


class _Draw:
    """Draws a case's tensors from one seeded generator, in the case's layout."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str, seed: int) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.numbers = Numbers(device, seed)

    def leaf(self, *shape: int, rows: int | None = None, gradient: bool = True) -> Tensor:
        """Normal numbers; from token `rows` on (where given) NaN; a gradient leaf."""
        wide = (*shape[:-1], shape[-1] + 3) if self.case.strided and shape else shape
        x = self.numbers.normal(wide)
        if rows is not None:
            x[rows:] = torch.nan
        x = x.to(self.device, self.dtype)
        x = x[..., 1 : 1 + shape[-1]] if self.case.strided and shape else x
        return x.requires_grad_(gradient)

    def epilogue(self, shape: tuple[int, ...], rows: int | None) -> dict[str, Tensor]:
        """Gate and residual for an output of this shape."""
        token = shape[:-2]
        gates = {"full": shape, "head": (*shape[:-1], 1), "token": (*token, 1, 1), "channel": shape[-2:], "scalar": ()}
        gates["heads"] = (shape[-2], 1)
        found = {}
        if self.case.gate:
            per_token = self.case.gate in ("full", "head", "token")
            found["gate"] = self.leaf(*gates[self.case.gate], rows=rows if per_token else None)
        if self.case.residual:
            found["residual"] = self.leaf(*shape, rows=rows)
        return found

    def tables(self) -> tuple[Tensor, Tensor]:
        """Rotary tables just long enough for the longest row."""
        longest = max((*self.case.lengths, *(self.case.query_lengths or ()), 1))
        cos, sin = rotary_tables(longest, self.case.rope)
        return cos.to(self.device), sin.to(self.device)

    def positions(self, total: int) -> Tensor:
        """Rotary positions of `total` tokens, anywhere in the tables."""
        drawn = torch.randint(self.tables()[0].shape[0], (total,), generator=self.numbers.generator)
        return drawn.to(self.device)


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of the case's public function, gradient leaves included, and the output's `grad_out`."""
    draw = _Draw(case, dtype, device, seed)
    make = {"apply_rotary": _rotary_inputs, "personalized_ffn": _ffn_inputs}.get(case.op, _attention_inputs)
    inputs, shape, rows = make(draw, case, offsets_of(case.lengths, case.index_dtype, device))
    return {**case.options, **inputs, "grad_out": draw.leaf(*shape, rows=rows, gradient=False)}


# The result of each maker: arguments, the output's shape, and its number of tokens before the tail (None: no tail).
_Made = tuple[dict[str, Any], tuple[int, ...], int | None]


def _attention_inputs(draw: _Draw, case: Case, offsets: Tensor) -> _Made:
    rows = sum(case.lengths)
    tokens, batch = rows + case.tail, len(case.lengths)
    value_size = case.head_size if case.shared_value else case.value_size
    inputs: dict[str, Any] = {
        "k": draw.leaf(tokens, case.kv_heads, case.head_size, rows=rows),
        "v": None if case.shared_value else draw.leaf(tokens, case.kv_heads, case.value_size, rows=rows),
    }
    shape: tuple[int, ...] = (batch, case.queries, case.heads, value_size)
    q_rows = None
    if case.op == "pma_pooling":
        inputs.update(seeds=draw.leaf(case.queries, case.heads, case.head_size), offsets=offsets)
    elif case.op == "gated_cross_attention" and case.query_lengths is None:
        inputs.update(q=draw.leaf(*shape[:3], case.head_size), kv_offsets=offsets)
    else:
        q_rows = rows if case.query_lengths is None else sum(case.query_lengths)
        inputs.update(_jagged_queries(draw, case, offsets, q_rows))
        shape = (q_rows + case.tail, case.heads, value_size)
    return {**inputs, **draw.epilogue(shape, q_rows)}, shape, q_rows


def _jagged_queries(draw: _Draw, case: Case, offsets: Tensor, rows: int) -> dict[str, Any]:
    """Queries, offsets and rotary arguments of a call whose queries are jagged."""
    found: dict[str, Any] = {"q": draw.leaf(rows + case.tail, case.heads, case.head_size, rows=rows)}
    own = None if case.query_lengths is None else offsets_of(case.query_lengths, case.index_dtype, draw.device)
    if case.op == "gated_cross_attention":
        return {**found, "kv_offsets": offsets, "q_offsets": own}
    found["offsets"] = offsets if own is None else own
    if own is not None:
        found["kv_offsets"] = offsets
    if case.rope:
        found["rope"] = draw.tables()
        if case.positions:
            pair = draw.positions(rows + case.tail), draw.positions(sum(case.lengths) + case.tail)
            found["rope_positions"] = pair[0] if own is None else pair
    return found


def _rotary_inputs(draw: _Draw, case: Case, offsets: Tensor) -> _Made:
    rows = sum(case.lengths)
    shape = (rows + case.tail, case.heads, case.head_size)
    inputs = {"x": draw.leaf(*shape, rows=rows), "offsets": offsets, "rope": draw.tables()}
    if case.positions:
        inputs["positions"] = draw.positions(shape[0])
    return inputs, shape, rows


def _ffn_inputs(draw: _Draw, case: Case, offsets: Tensor) -> _Made:
    rows, batch = sum(case.lengths), len(case.lengths)
    shape = (rows + case.tail, case.value_size)
    inputs = {"x": draw.leaf(shape[0], case.head_size, rows=rows), "offsets": offsets}
    inputs["weight"] = draw.leaf(batch, case.head_size, case.value_size)
    if case.bias:
        inputs["bias"] = draw.leaf(batch, case.value_size)
    if case.residual:
        inputs["residual"] = draw.leaf(*shape, rows=rows)
    return inputs, shape, rows


def row_of(x: Tensor, lengths: Sequence[int], b: int, end: int | None = None) -> Tensor:
    """The part of a tensor of rows, or of their tokens, that belongs to row `b`, or to rows `b .. end - 1`."""
    end = b + 1 if end is None else end
    first = sum(lengths[:b])
    return x[b:end] if x.shape[0] == len(lengths) else x[first : first + sum(lengths[b:end])]


def alone(inputs: Mapping[str, Any], lengths: Sequence[int], b: int, end: int | None = None) -> dict[str, Any]:
    """The call of row `b` of a batch (of rows `b .. end - 1`) by itself.

    Tensors of rows and tokens are cut, all else is shared.
    """
    found = dict(inputs)
    for name, x in inputs.items():
        if name in ("offsets", "kv_offsets"):
            found[name] = offsets_of(lengths[b : b + 1 if end is None else end], x.dtype, str(x.device))
        elif _of_rows(name, x, inputs):
            found[name] = row_of(x.detach(), lengths, b, end).requires_grad_(x.requires_grad)
    return found


def _of_rows(name: str, x: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether an argument has something for every row, or every token of theirs."""
    if name == "gate":  # may be of the output's shape up to sizes of 1, or broadcast over rows and tokens
        return x is not None and x.dim() == inputs["grad_out"].dim()
    return x is not None and name in ("q", "k", "v", "x", "weight", "bias", "residual", "grad_out")
