"""Programs of the kernels of tiles: a grid that follows from sizes, or a list of the tiles that have work."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interformer_kernels._launch.plans import Facts
from interformer_kernels._triton import _run
from interformer_kernels._triton._rows import marks, slots
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
    """The tokens whose tiles are wanted, and those of the other side where its rows have offsets, too; what a plan
    knows of either."""

    offsets: Tensor
    tokens: int
    opposite: Tensor | None
    opposite_tokens: int
    facts: Facts | None = None
    opposite_facts: Facts | None = None

    @property
    def planned(self) -> bool:
        """Whether a plan knows all that decides about tiles."""
        return self.facts is not None and (self.opposite is None or self.opposite_facts is not None)

    def short_rows(self, cell: int) -> Tensor:
        """Whether each row is left to the kernels of short rows; known to a plan."""
        assert self.facts is not None
        short = self.facts.lengths(self.tokens) <= cell
        if self.opposite_facts is not None:
            short &= self.opposite_facts.lengths(self.opposite_tokens) <= cell
        return short

    def any_short(self, cell: int, above: int = 0) -> bool:
        """Whether any row with tokens fits a cell, and none of `above` tokens; where no plan knows, some may."""
        if self.facts is None or not self.planned:
            return True
        opposite = self.opposite_facts and self.opposite_facts.number
        key = "short", cell, above, self.tokens, self.opposite_tokens, opposite
        return bool(self.facts.kept(key, lambda: self._short_tokens(cell, above) > 0))

    def _short_tokens(self, cell: int, above: int) -> int:
        """Tokens of rows that fit a cell, and none of `above` tokens."""
        sides = (self.facts, self.tokens), (self.opposite_facts, self.opposite_tokens)
        lengths = sum(facts.lengths(tokens) for facts, tokens in sides if facts is not None)
        chosen = self.short_rows(cell)
        if above:
            chosen = chosen & ~self.short_rows(above)
        return int(torch.as_tensor(lengths)[chosen].sum())

    def live_tiles(self, per_token: int, block: int, cell: int) -> int:
        """Number of tiles that have work; known to a plan."""
        assert self.facts is not None
        tiles = (self.facts.lengths(self.tokens) * per_token + block - 1) // block
        if cell:
            tiles = tiles[~self.short_rows(cell)]
        return int(tiles.sum()) - (-self.facts.tail(self.tokens) * per_token // block)


class Programs(NamedTuple):
    """The grid of a kernel of tiles, its list of them, and whether a program has several."""

    grid: int
    tile_list: Tensor | None
    persistent: bool


class Splits(NamedTuple):
    """How rows of many keys under few queries are split: found by marks (`_rows.py`), or in the lists of a plan."""

    split_kv: int  # keys of a split; 0 where no row is split
    later: int = 0  # programs for splits behind the first of a row, in each tile of queries
    split_list: Tensor | None = None  # row and split of each of those
    combined: int = 0  # programs that combine the splits of a row, likewise
    split_rows: Tensor | None = None  # row of each of those


def splits_by_marks(tokens: int, split_kv: int) -> Splits:
    """The splits of rows of which nothing is known."""
    number = marks(tokens, split_kv)
    return Splits(split_kv, number, None, number, None)


def splits_of(keys: Side, skip: int, split_kv: int) -> Splits:
    """The splits of the rows on the keys' side, whose first `skip` keys are left out."""
    if keys.facts is None:
        return splits_by_marks(keys.tokens, split_kv)
    key = "splits", keys.tokens, skip, split_kv, _run.stream_of(keys.offsets)
    planned: Any = keys.facts.kept(key, lambda: _planned_splits(keys, skip, split_kv))
    return Splits(*planned)


def _planned_splits(keys: Side, skip: int, split_kv: int) -> Splits:
    """The splits that a plan knows; none where no row has more than `split_kv` keys."""
    assert keys.facts is not None
    later = ((keys.facts.lengths(keys.tokens) - skip - 1) // split_kv).clamp(min=0)
    rows = later.nonzero().flatten()
    if not len(rows):
        return Splits(0)
    later = later[rows]
    split = torch.arange(int(later.sum())) - (later.cumsum(0) - later).repeat_interleave(later) + 1
    entries = torch.stack((rows.repeat_interleave(later), split), 1)
    split_list, split_rows = (x.to(keys.offsets.device, torch.int32) for x in (entries, rows))
    return Splits(split_kv, len(split), split_list, len(rows), split_rows)


class TileLists:
    """The lists of one call: kernels with equal tiles share one. A plan keeps them for all calls."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Tensor] = {}

    def programs(self, side: Side, per_token: int, block: int, cell: int, packs: int, loops: bool) -> Programs:
        """Programs for the tiles of one side, for `packs` groups of heads each; whether a kernel may take several
        tiles in a loop, which costs registers."""
        rows = side.offsets.shape[0] - 1
        capacity = slots(side.tokens, rows, per_token, block)
        largest = max(side.tokens * per_token, capacity * packs, side.opposite_tokens)
        if largest > _MOST_PACKED_ROWS or not (rows >= MANY_ROWS or side.planned):
            return Programs(capacity * packs, None, False)
        # In self attention both sides are one.
        opposite = None if side.opposite is side.offsets else side.opposite
        key: tuple[Any, ...] = side.tokens, per_token, block, cell, None if opposite is None else side.opposite_tokens
        if side.planned:
            return _planned_programs(side, opposite, key, packs)
        key = (*key, 0 if opposite is None else id(side.offsets))
        if key not in self._made:
            self._made[key] = _listed(side, opposite, capacity, per_token, block, cell)
        if not loops or max(side.tokens, side.opposite_tokens) > rows * cell:
            return Programs(capacity * packs, self._made[key], False)
        most = _PER_PROCESSOR * _run.processors(side.offsets)
        return Programs(min(capacity * packs, most), self._made[key], True)


def _planned_programs(side: Side, opposite: Tensor | None, key: tuple[Any, ...], packs: int) -> Programs:
    """A program for each live tile, from the list that a plan keeps; none where there are none."""
    _, per_token, block, cell, _ = key
    facts: Any = side.facts
    key = (*key, side.opposite_facts and side.opposite_facts.number)
    live = facts.kept(("number", *key), lambda: side.live_tiles(per_token, block, cell))
    if not live:
        return Programs(0, None, False)
    # A list is read on the stream that wrote it.
    key = ("list", *key, _run.stream_of(side.offsets))
    tile_list = facts.kept(key, lambda: _listed(side, opposite, live, per_token, block, cell))
    return Programs(live * packs, tile_list, False)


def _listed(side: Side, opposite: Tensor | None, number: int, per_token: int, block: int, cell: int) -> Tensor:
    """The list of the tiles of a side, of which there are `number` at most."""
    rows = side.offsets.shape[0] - 1
    entries = side.offsets.new_empty((number + 1) * ENTRY.value, dtype=torch.int32)
    _run.start(
        list_tiles, -(-(rows + 1) // ROWS), side.offsets, opposite, entries, rows, side.tokens, side.opposite_tokens,
        PER_TOKEN=per_token, BLOCK=block, CELL=cell, ROWS=ROWS, lead=entries, tiles=Tiles(ROWS, 1, WARPS, 1),
    )  # fmt: skip
    return entries
