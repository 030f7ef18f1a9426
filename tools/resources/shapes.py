"""The shapes that predictions are made for, and the launches that our launchers record at each.

Tensors are never touched, so they take no memory; offsets have their numbers.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from interformer_kernels._calls import AttentionCall, FfnCall
from interformer_kernels._triton import _run, attention, personalized_ffn
from interformer_kernels._triton._run import Launch
from resources.interpreted import interpreted, tensors
from resources.triton_kernels import TARGETS


class Shape(NamedTuple):
    """A call at one shape: what runs its forward, and its forward and backward; lengths; sizes for the rivals."""

    name: str
    op: str
    lengths: tuple[int, ...]
    heads: int
    width: int
    queries: int = 0  # of a row; 0: its tokens


def _spread(rows: int, low: int, high: int) -> tuple[int, ...]:
    """Lengths that are equally likely, in a drawn order."""
    lengths = [low + i * (high - low + 1) // rows for i in range(rows)]
    random.Random(0).shuffle(lengths)
    return tuple(lengths)


def _journey(rows: int) -> tuple[int, ...]:
    """Lengths near those of histories in The Complete Journey, at equal steps through its quantiles."""
    knots = (0, 48, 143, 367, 757, 1268, 2600), (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    lengths = [int(_between((i + 0.5) / rows, *knots)) for i in range(rows)]
    random.Random(0).shuffle(lengths)
    return tuple(lengths)


def _between(level: float, heights: tuple[int, ...], levels: tuple[float, ...]) -> float:
    right = next(i for i, at in enumerate(levels) if level < at)
    share = (level - levels[right - 1]) / (levels[right] - levels[right - 1])
    return heights[right - 1] + share * (heights[right] - heights[right - 1])


SHAPES = (
    Shape("jagged B2048 L104 H4 D16", "jagged", (104,) * 2048, 4, 16),
    Shape("jagged B2048 L54 H8 D8", "jagged", (54,) * 2048, 8, 8),
    Shape("jagged B2048 L104 H1 D64", "jagged", (104,) * 2048, 1, 64),
    Shape("jagged B1152 mean 500 H4 D64", "jagged", _spread(1152, 400, 600), 4, 64),
    Shape("jagged B1152 L1000 H4 D128", "jagged", (1000,) * 1152, 4, 128),
    Shape("jagged B16 L4096 H8 D64", "jagged", (4096,) * 16, 8, 64),
    Shape("jagged B65536 L1-32 H2 D32", "jagged", _spread(65536, 1, 32), 2, 32),
    Shape("pma B2048 L104 H4 D16 M2", "pma", (104,) * 2048, 4, 16, 2),
    Shape("pma B1152 mean 500 H4 D64 M32", "pma", _spread(1152, 400, 600), 4, 64, 32),
    Shape("pma B1152 L1000 H4 D128 M192", "pma", (1000,) * 1152, 4, 128, 192),
    Shape("pma B16 L4096 H8 D64 M2", "pma", (4096,) * 16, 8, 64, 2),
    Shape("pma B65536 L1-32 H2 D32 M2", "pma", _spread(65536, 1, 32), 2, 32, 2),
    Shape("shared keys B64 mean 542 H4 D64 N512", "shared keys", _journey(64), 4, 64, 512),
    Shape("ffn B1152 L256 E64 F64", "ffn", (256,) * 1152, 1, 64),
)


# ---------------------------------------------------------------- launches


class _Elsewhere(TorchDispatchMode):
    """Counts PyTorch's own operations that would start kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(argument.alias_info is not None for argument in func._schema.arguments)
        if not views and not func.name().startswith(("aten::empty", "aten::new_empty", "aten::detach")):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Recorded(NamedTuple):
    """Launches of our kernels, and PyTorch's own operations."""

    launches: list[Launch]
    others: list[str]


def call_of(shape: Shape, dtype: torch.dtype) -> Any:
    tokens, rows = sum(shape.lengths), len(shape.lengths)
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    offsets[1:] = torch.tensor(shape.lengths).cumsum(0)

    # Memory that nothing touches takes no room.
    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype)

    if shape.op == "ffn":
        return FfnCall(new(tokens, shape.width), new(rows, shape.width, shape.width), offsets, None, "identity")
    k, v = (new(tokens, shape.heads, shape.width) for _ in range(2))
    maps = "multiply", "sigmoid", shape.width**-0.5, "softmax", 1.0
    if shape.op == "pma":
        return AttentionCall("shared", new(shape.queries, shape.heads, shape.width), k, v, None, offsets, None, *maps)
    if shape.op == "shared keys":  # as `kv_rows` makes it of queries in order
        q_offsets = torch.arange(rows + 1) * shape.queries
        q = new(rows * shape.queries, shape.heads, shape.width)
        return AttentionCall("packed", q, k, v, q_offsets, offsets, None, *maps, queries_apart=True)
    return AttentionCall("packed", new(tokens, shape.heads, shape.width), k, v, None, offsets, None, *maps)


def record(shape: Shape, training: bool, dtype: torch.dtype = torch.bfloat16) -> Recorded:
    """The launches of a forward, or of the backward that follows it in training."""
    call = call_of(shape, dtype)
    elsewhere = _Elsewhere()
    with _run.recording(TARGETS["sm_90"][0]) as launches:
        if shape.op == "ffn":
            with elsewhere:
                out = personalized_ffn.forward(call, None)
            if training:
                launches.clear()
                with elsewhere:
                    personalized_ffn.backward(call, out)
        else:
            with elsewhere:
                out, lse, attn_out = attention.forward(call, None, training)
            if training:
                launches.clear()
                elsewhere.names.clear()
                with elsewhere:
                    attention.backward(call, out, attn_out, lse)
    # Other kernels read what these write: lists of tiles, say.
    lists = [launch for launch in launches if not any(x.is_floating_point() for x in tensors(launch.arguments))]
    if lists:
        interpreted(lists)
    return Recorded([launch for launch in launches if launch.grid], elsewhere.names)
