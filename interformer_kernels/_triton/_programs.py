"""Programs of the kernels of tiles: a grid that follows from sizes, or a list of the tiles that have work."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from interformer_kernels._triton import _run
from interformer_kernels._triton._rows import slots
from interformer_kernels._triton._tile_list import ENTRY, ROWS, WARPS, list_tiles
from interformer_kernels._triton._tiles import Tiles

# Rows from which a call lists its tiles: below them the search costs less than the launch.
MANY_ROWS = 2048
# Where the mean row is short, most slots have no tile: so many programs for each processor, a few times as many as are
# resident at once, take the tiles in turn. The loop over tiles costs a third of a kernel's registers, so elsewhere each
# slot is a program, and idle ones end as soon as they have read the number of tiles.
_PER_PROCESSOR = 32
_MOST_PACKED_ROWS = 2**31 - 1  # of a list, whose entries have 32 bits


class Side(NamedTuple):
    """The tokens whose tiles are listed, and those of the other side where its rows have offsets, too."""

    offsets: Tensor
    tokens: int
    opposite: Tensor | None
    opposite_tokens: int


class Programs(NamedTuple):
    """The grid of a kernel of tiles, its list of them, and whether a program has several."""

    grid: int
    tile_list: Tensor | None
    persistent: bool


class TileLists:
    """The lists of one call: kernels with equal tiles share one."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], Tensor] = {}

    def programs(self, side: Side, per_token: int, block: int, cell: int, packs: int) -> Programs:
        """Programs for the tiles of one side, for `packs` groups of heads each."""
        rows = side.offsets.shape[0] - 1
        capacity = slots(side.tokens, rows, per_token, block)
        largest = max(side.tokens * per_token, capacity * packs, side.opposite_tokens)
        if rows < MANY_ROWS or largest > _MOST_PACKED_ROWS:
            return Programs(capacity * packs, None, False)
        listed = self._listed(side, capacity, per_token, block, cell)
        if side.tokens > rows * cell:
            return Programs(capacity * packs, listed, False)
        return Programs(min(capacity * packs, _PER_PROCESSOR * _run.processors(side.offsets)), listed, True)

    def _listed(self, side: Side, capacity: int, per_token: int, block: int, cell: int) -> Tensor:
        opposite = None if side.opposite is side.offsets else side.opposite
        # In self attention both sides are one.
        key = 0 if opposite is None else id(side.offsets), per_token, block, cell
        entries = self._made.get(key)
        if entries is None:
            rows = side.offsets.shape[0] - 1
            entries = side.offsets.new_empty((capacity + 1) * ENTRY.value, dtype=torch.int32)
            _run.start(
                list_tiles, -(-(rows + 1) // ROWS), side.offsets, opposite, entries, rows, side.tokens,
                side.opposite_tokens, PER_TOKEN=per_token, BLOCK=block, CELL=cell, ROWS=ROWS,
                lead=entries, tiles=Tiles(ROWS, 1, WARPS, 1),
            )  # fmt: skip
            self._made[key] = entries
        return entries
