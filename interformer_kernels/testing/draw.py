"""Random tensors in the layout of a case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interformer_kernels._launch.tensors import accumulation_dtype
from interformer_kernels.testing.case import Case


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


class Draw:
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

    def table(self, *shape: int) -> Tensor:
        """Normal numbers of the accumulation dtype, a gradient leaf."""
        return self.numbers.normal(shape).to(self.device, accumulation_dtype(self.dtype)).requires_grad_()

    def whole(self, low: int, high: int, count: int) -> Tensor:
        """So many int64 numbers from `low` to below `high`."""
        return torch.randint(low, high, (count,), generator=self.numbers.generator).to(self.device)

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


# The result of an op's maker of inputs: arguments, the output's shape, and its number of tokens before the tail (None:
# no tail).
Made = tuple[dict[str, Any], tuple[int, ...], int | None]
