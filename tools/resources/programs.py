"""Programs of jagged attention's launches that have work, and those that have none, by shape, without a device.

`PYTHONPATH=tools python -m resources.programs` prints a line for each launch of a forward and backward: its grid, live
and idle programs, programs resident on a processor, and waves on 132 processors. `--way` chooses how programs find
their rows: by a "search", by a "list" for each call, or by the list of a "plan"; `call` is what a call without a plan
does. `--lengths 5x3,7x100` is a batch of 5 rows of 3 tokens and 7 of 100.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import interformer_kernels
from interformer_kernels._calls import AttentionCall
from interformer_kernels._cli.arguments import count
from interformer_kernels._cli.tables import print_table
from interformer_kernels._launch.plans import Facts
from interformer_kernels._triton import _programs, _run, attention
from interformer_kernels._triton._programs import Side
from interformer_kernels._triton._run import Launch
from resources import triton_kernels
from resources.bounds import PROCESSORS, compiled, resident_programs

TARGET = "sm_90"
_WAYS = {"search": 2**31, "list": 0, "call": _programs.MANY_ROWS, "plan": 2**31}


class Batch(NamedTuple):
    """Lengths of the rows, heads, and channels of a head."""

    name: str
    lengths: Tensor
    heads: int
    channels: int


def _spread(rows: int, least: int, most: int) -> Tensor:
    """Lengths from `least` to `most`, equally often."""
    return torch.arange(rows) % (most - least + 1) + least


BATCHES = (
    Batch("65536 rows of 1-32, H2 D32", _spread(65536, 1, 32), 2, 32),
    Batch("2048 rows of 104, H4 D16", _spread(2048, 104, 104), 4, 16),
    Batch("2048 rows of 104, H1 D64", _spread(2048, 104, 104), 1, 64),
    Batch("2048 rows of 54, H8 D8", _spread(2048, 54, 54), 8, 8),
    Batch("1152 rows of 1-1000, H4 D64", _spread(1152, 1, 1000), 4, 64),
    Batch("16 rows of 4096, H8 D64", _spread(16, 4096, 4096), 8, 64),
)


class Programs(NamedTuple):
    """A launch, and how many of its programs have work."""

    kernel: str
    grid: int
    live: int
    launch: Launch

    @property
    def idle(self) -> int:
        """Programs without work."""
        return self.grid - self.live


def programs_of(batch: Batch, way: str, dtype: torch.dtype = torch.bfloat16) -> list[Programs]:
    """The launches of self attention, forward and backward; none is made."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), batch.lengths.cumsum(0)])
    x = torch.empty(int(offsets[-1]), batch.heads, batch.channels, dtype=dtype, device="meta")
    call = AttentionCall("packed", x, x, x, None, offsets, scale=batch.channels**-0.5)
    facts, many_rows = Facts(offsets), _programs.MANY_ROWS
    plan = interformer_kernels.plan(offsets) if way == "plan" else None
    _programs.MANY_ROWS = _WAYS[way]
    try:
        with _run.recording(triton_kernels.TARGETS[TARGET][0]) as launches:
            out, lse, attn_out = attention.forward(call, None, dtype != torch.float32)
            attention.backward(call, out, attn_out, lse)
    finally:
        _programs.MANY_ROWS = many_rows
        if plan is not None:
            plan.close()
    side = Side(offsets, x.shape[0], offsets, x.shape[0], facts, facts)
    return [
        Programs(launch.kernel.fn.__name__, launch.grid, live_programs(launch, side), launch)
        for launch in launches
        if launch.grid
    ]


def live_programs(launch: Launch, side: Side) -> int:
    """Programs of a launch that have work; all of them, of kernels that do not find rows."""
    name = launch.kernel.fn.__name__
    shape: Any = launch.constants.get("SHAPE")
    if name.endswith("_short"):
        short = side.short_rows(shape.cell)
        cells = shape.block // shape.cell
        groups = torch.nn.functional.pad(short, (0, -len(short) % cells)).view(-1, cells)
        return int(groups.any(1).sum()) * shape.kv_heads
    if name in triton_kernels.SCORE_LOOPS:
        keys = name == "attention_grad_keys"
        per_token = shape.pack if keys else shape.pack * shape.q_per_kv
        tiles = side.live_tiles(per_token, shape.block_k if keys else shape.block_q, shape.cell)
        return min(launch.grid, tiles * shape.packs)
    return launch.grid


def _resident(launch: Launch) -> int:
    kernel = compiled(launch)
    return resident_programs(kernel.registers, kernel.shared, launch.tiles.warps)


def _batch(text: str, heads: int, channels: int) -> Batch:
    groups = [group.split("x") for group in text.split(",")]
    lengths = torch.tensor([int(length) for rows, length in groups for _ in range(int(rows))])
    return Batch(f"{text}, H{heads} D{channels}", lengths, heads, channels)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", action="append", choices=tuple(_WAYS), help="default: search, call and plan")
    parser.add_argument("--lengths", help="rows x tokens, separated by commas, instead of the usual batches")
    parser.add_argument("--heads", type=count, default=4)
    parser.add_argument("--channels", type=count, default=64)
    parser.add_argument("--grids", action="store_true", help="compile nothing: no resident programs and waves")
    chosen = parser.parse_args(arguments)
    batches = [_batch(chosen.lengths, chosen.heads, chosen.channels)] if chosen.lengths else BATCHES
    lines = []
    for batch in batches:
        for way in chosen.way or ("search", "call", "plan"):
            for kernel, grid, live, launch in programs_of(batch, way):
                at_once = 0 if chosen.grids else _resident(launch)
                waves = f"{grid / (at_once * PROCESSORS):.1f}" if at_once else ""
                share = f"{math.ceil(100 * (grid - live) / grid)} %"
                lines.append(
                    (batch.name, way, kernel, *map(str, (grid, live, grid - live)), share, str(at_once or ""), waves)
                )
    columns = "batch", "way", "kernel", "grid", "live", "idle", "", "a processor", "waves"
    print_table(f"Programs of jagged attention in bfloat16, forward and backward, on {TARGET}", columns, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
