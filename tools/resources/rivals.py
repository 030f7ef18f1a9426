"""FlashAttention 2, by whose machine code ours is judged: its kernels as torch 2.11 ships them for sm_90.

Counted in the library itself (`cuobjdump -xelf sm_90 libtorch_cuda.so`, then `machine_code.py`): not causal, rows of
different lengths, bfloat16, the products by `mma.sync`. `varlen_attn` runs them. `first` are the instructions of a
program with one tile of keys, whose loop body is the masked copy; each further tile takes `loop`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_WARP = 32


class Counted(NamedTuple):
    """One kernel: rows of a program's tile and of a streamed one, warps, instructions, programs of a multiprocessor,
    and its products of the tile.
    """

    queries: int
    keys: int
    warps: int
    first: int
    loop: int
    resident: int
    products: int


# By the widest head that a kernel serves.
FORWARD = {
    32: Counted(128, 128, 4, 2602, 1424, 2, 2),
    64: Counted(128, 128, 4, 3054, 1631, 2, 2),
    128: Counted(128, 64, 4, 2760, 1158, 2, 2),
}
# Its backward was counted for heads of 64 channels alone, which stand for narrower ones, too. A program has a tile of
# keys; delta and the conversion of dQ are passes of their own, bound by memory.
BACKWARD = {64: Counted(128, 128, 8, 2404, 1551, 1, 5)}
# Shares of its bounds that it reaches on H100: 330 of 596 TFLOP/s forward, 260 of 612 backward.
REACHED = {"forward": 0.575, "backward": 0.42}
# Cycles that a warp takes for an instruction, by the stalls of our own loops; a program alone is that slow.
_STALL = 1.57


class Rival(NamedTuple):
    """A pass of FlashAttention 2 in microseconds: its bound, and the time expected of it."""

    bound: float
    expected: float


class Device(NamedTuple):
    """The limits that the method needs."""

    processors: int
    clock: float
    issue: int
    product_rate: float
    copy: float


def _programs(kernel: Counted, rows: Sequence[tuple[int, int]], heads: int) -> tuple[int, int]:
    """Programs, and the further streamed tiles of all of them, for pairs of stationary and streamed tokens."""
    programs = further = 0
    for stationary, streamed in rows:
        tiles = math.ceil(stationary / kernel.queries)
        programs += tiles * heads
        further += tiles * heads * max(0, math.ceil(streamed / kernel.keys) - 1)
    return programs, further


def rival(
    direction: str, rows: Sequence[tuple[int, int]], heads: int, width: int, tokens: int, device: Device
) -> Rival | None:
    """The bound of a pass over rows of so many queries and keys; None where no kernel was counted."""
    kernels = FORWARD if direction == "forward" else BACKWARD
    padded = next((limit for limit in kernels if width <= limit), None)
    if padded is None:
        return None
    kernel = kernels[padded]
    oriented = rows if direction == "forward" else [(keys, queries) for queries, keys in rows]
    programs, further = _programs(kernel, oriented, heads)
    tiles = programs + further
    second = device.processors * device.clock
    issue = kernel.warps * (programs * kernel.first + further * kernel.loop) / (device.issue * second)
    flops = 2 * kernel.products * kernel.queries * kernel.keys * max(padded, 32) * tiles
    waves = math.ceil(programs / (device.processors * kernel.resident))
    alone = waves * _STALL * (kernel.first + kernel.loop * further / programs) / device.clock
    # Queries, keys, values and output, forward; with their gradients, and dQ in float32, backward.
    moved = tokens * heads * width * 2 * (1 if direction == "forward" else 3) / device.copy
    busy = max(issue, flops / device.product_rate)
    return Rival(1e6 * max(busy, moved, alone), 1e6 * max(busy / REACHED[direction], moved, alone))
