"""The geometry that an attention call's kernels are compiled for: sizes that stay from batch to batch, and their tiles.

A geometry is made once and serves all calls like it, since to make its tuples anew would take longer than to launch a
kernel. It knows no tensors, and no number of rows or tokens.
"""

from __future__ import annotations

import functools

from interformer_kernels._triton._arguments import RopeOptions, Shape, ShortShape
from interformer_kernels._triton._tiles import Target, Tiles, entries, padded, tiles, variant, widest_rope

_MIN_TILE_ROWS = 16  # rows of a tile that tensor cores take
# Queries of a tile, and channels, up to which the backward of whole rows has registers for a loop over query heads.
_MOST_LOOPED = 64
_WIDE_HEAD = 128  # padded channels of a head from which heads are not packed
_NUMBERS_OF_WARP = 256  # of a tile that combines partials, at least
_TILE_NUMBERS = 4096  # of a tile that combines partials
_PACKED = {"grad_queries": ("grad_queries_packed",)}  # entries that replace a kernel's for packed queries
# Tiles of packed queries for 16-bit heads that fill their padded width only in part, where those of full heads spill
# on compute capability 9.0: the mask of channels takes registers.
_MASKED: dict[str, dict[int, Tiles]] = {
    "forward": {128: Tiles(64, 32, 8), 256: Tiles(32, 32, 8)},
    "grad_queries": {64: Tiles(64, 32), 128: Tiles(64, 16, 8), 256: Tiles(16, 16, 8)},
    "grad_keys": {128: Tiles(32, 64, 8)},
    "short": {64: Tiles(64, 32, 8, 1)},
}
# Tiles of calls with biases in place of the tables', by bytes of a number and padded channels: gathers from tables, and
# differences of times of 64 bits, take the registers of larger tiles.
_BIASED: dict[str, dict[int, dict[int, Tiles]]] = {
    "forward": {
        2: {64: Tiles(64, 32, 8), 128: Tiles(32, 32, 8), 512: Tiles(16, 16)},
        4: {64: Tiles(32, 16), 512: Tiles(16, 16)},
    },
    "grad_queries": {2: {64: Tiles(64, 32, 8), 128: Tiles(32, 32, 8), 512: Tiles(16, 16)}, 4: {}},
    "grad_keys": {2: {64: Tiles(32, 16), 128: Tiles(32, 32, 8), 512: Tiles(16, 16)}, 4: {512: Tiles(16, 16, 8)}},
    "grad_biases": {
        2: {64: Tiles(16, 16, 4, 1), 512: Tiles(16, 16, 8, 1)},
        4: {64: Tiles(16, 16, 4, 1), 512: Tiles(16, 16, 8, 1)},
    },
}
# Kernels whose threads may have so many registers, by an option of the call, from a compute capability on. Without a
# limit, NVIDIA's assembler holds registers back, so that more programs are resident together, and spills a few bytes;
# with one it takes what it needs. Where it needs too many it spills more, so no other kernel has a limit.
_MAXNREG = 224
_LIMITED = {
    "biases": {"grad_queries": 90, "grad_biases": 80},
    "targets": {"grad_queries": 80},
    "capped": {"grad_queries": 80},
    "grad_lse": {"grad_queries": 80, "grad_keys": 80},
}
# Keys of a tile under dropout, whose random words take registers: of dQ's, where a few queries share it, and of dK's.
_MOST_KEYS = {"grad_queries": 32, "grad_keys": 64}
# Tiles of float32 heads of 33 to 64 channels under dropout, before 9.0.
_DROPPED = {"grad_queries": Tiles(16, 32, 8), "grad_keys": Tiles(32, 16)}


class Geometry:
    """Layout, score, heads, channels and queries of a row (0 where rows differ), for a device, a dtype, a direction.

    `pairs` of rotary embedding, 0 without it. `tiled`: no rows are left to the kernels of short and of whole rows.
    `option`: the first one that the call has of "biases", "dropout", "targets", "capped" (by softcap or sinks) and
    "grad_lse" (a gradient of the log-sum-exp), else "". Whether kernels rotate queries and keys depends on numbers of
    tokens, so shapes take that as an argument.
    """

    def __init__(
        self, layout: str, score: str, v_is_k: bool, d: int, dv: int, heads: int, kv_heads: int, queries: int,
        itemsize: int, target: Target, precision: str, pairs: int, backward: bool, tiled: bool, option: str,
    ) -> None:  # fmt: skip
        self.layout, self.score, self.v_is_k, self.d, self.dv, self.precision = layout, score, v_is_k, d, dv, precision
        self.kv_heads, self.q_per_kv, self.queries = kv_heads, heads // kv_heads, queries
        self.width = max(padded(d), padded(dv))
        self._fills_tiles = d == padded(d) and dv == padded(dv)  # heads have as many channels as their tiles
        self.on = itemsize, target
        # Kernels rotate gradients, at least. Otherwise passes beside them do it all.
        self.rotates = pairs > 0 and self.width <= widest_rope(*self.on) and pairs % 4 == 0
        self._option = option
        self._suffix = "_rope" if self.rotates else ""
        self.pack = self._pack()
        self.heads_per_program = self.pack * self.q_per_kv  # query heads, and so packed rows of a query token
        self.packs = kv_heads // self.pack  # programs that divide the key/value heads among themselves
        short = None if tiled else self._short_tiles()
        self.short = {False: short, True: self._short_tiles_of_backward(short)}
        self.short_cell = 0 if short is None else short.keys  # tokens of a row left to the kernels of short rows
        self.whole = self._whole_tiles() if backward and layout == "packed" and not tiled else ()
        self.cell = self.whole[-1].keys if self.whole else self.short_cell  # that kernels of tiles leave to others
        self.tiles, self.tiles_of_partials = functools.cache(self._tiles), functools.cache(self._tiles_of_partials)
        self.shape, self.short_shape = functools.cache(self._shape), functools.cache(self._short_shape)
        self.whole_shape = functools.cache(self._whole_shape)

    def _pack(self) -> int:
        """Key/value heads that a program takes at once, so that few queries fill a tile.

        Wide heads are not packed: to repeat each head alone (`_attention_tiles.of_attempt`) takes registers that they
        lack.
        """
        pack = 1
        if self.layout != "packed" and self.queries and self.width < _WIDE_HEAD:
            while self.kv_heads % (2 * pack) == 0 and 2 * pack * self.q_per_kv * self.queries <= _MIN_TILE_ROWS:
                pack *= 2
        return pack

    def _short_tiles(self) -> Tiles | None:
        """Tiles of short rows, of `keys` tokens at most; None where there are none."""
        if self.layout != "packed" or self.width > max(entries("short", *self.on)):
            return None
        entry = tiles(f"short{self._suffix}", self.width, *self.on)
        return entry if self.rotates else self._masked("short", entry)

    def _masked(self, kernel: str, entry: Tiles) -> Tiles:
        """The tiles of a kernel of packed queries where heads do not fill them; tuned ones are left as they are."""
        itemsize, target = self.on
        concerned = not self._fills_tiles and itemsize == 2 and target.kind == "cuda" and 90 <= target.capability < 100
        tuned = not any(entry in entries(name, *self.on).values() for name in (kernel, *_PACKED.get(kernel, ())))
        return _MASKED[kernel].get(self.width, entry) if concerned and not tuned else entry

    def _short_tiles_of_backward(self, forward: Tiles | None) -> Tiles | None:
        own = None if forward is None else variant(f"short_backward{self._suffix}", self.width, *self.on)
        # Both passes leave the same rows to these kernels, even where a tuned tile has another number of tokens.
        return own if own is not None and forward is not None and own.keys == forward.keys else forward

    def _whole_tiles(self) -> tuple[Tiles, ...]:
        """Tiles of the backward of whole rows, of at most `keys` tokens each, and of more than the ones before."""
        cell, found = self.short_cell, []
        # A mask of channels, and derivatives of pointwise scores, take registers that larger tiles lack.
        large = (
            self._option != "targets"
            and self._fills_tiles
            and (self.score == "softmax" or (self.width == 32 and self.score != "gelu"))
        )
        for kernel in ("whole", "whole_long") if large else ("whole",):
            entry = variant(f"{kernel}{self._suffix}", self.width, *self.on)
            looped = entry is not None and max(entry.queries, self.width) <= _MOST_LOOPED
            if entry is not None and entry.keys > cell and (looped or self.q_per_kv == 1):
                if self._option == "targets":
                    entry = entry._replace(warps=8)  # their masks take registers that four lack
                found.append(entry)
                cell = entry.keys
        return tuple(found)

    def _tiles(self, kernel: str) -> Tiles:
        """Tiles of a kernel, with the limit of its registers."""
        entry, (_, target) = self._tiles_of_table(kernel), self.on
        since = _LIMITED.get(self._option, {}).get(kernel)
        limited = since is not None and target.kind == "cuda" and target.capability >= since
        return entry._replace(maxnreg=_MAXNREG) if limited else entry

    def _tiles_of_table(self, kernel: str) -> Tiles:
        """Tiles of a kernel; no more queries than rows have, where that is known."""
        replaced = _BIASED[kernel][self.on[0]] if self._option == "biases" else {}
        if replaced:
            # On AMD eight warps leave no registers to tiles of wide heads.
            wide = self.width > 64 and self.on[1].kind == "hip"
            entry = replaced[
                min((width for width in replaced if width >= self.width and not wide), default=max(replaced))
            ]
        elif self.rotates:
            return tiles(f"{kernel}_rope", self.width, *self.on)
        else:
            entry = tiles(kernel, self.width, *self.on)
        if self.layout == "packed":
            own = None if replaced or kernel != "grad_queries" else variant("grad_queries_packed", self.width, *self.on)
            return entry if replaced else self._under_dropout(kernel, self._masked(kernel, own or entry))
        entry = self._under_dropout(kernel, entry)
        queries = min(entry.queries, padded(max(1, self.queries * self.heads_per_program)))
        # Masks of channels take registers that a tile of few queries and many keys lacks in so few warps.
        masked = kernel == "forward" and queries < entry.keys and not self._fills_tiles and self.on[0] == 2
        return entry._replace(queries=queries, warps=max(entry.warps, 8 if masked else 1))

    def _under_dropout(self, kernel: str, entry: Tiles) -> Tiles:
        """The tiles of a kernel; under dropout, those that leave registers for random words."""
        itemsize, target = self.on
        if self._option != "dropout" or kernel not in _MOST_KEYS:
            return entry
        if itemsize == 4 and 32 < self.width <= 64 and target.kind == "cuda" and target.capability < 90:
            return _DROPPED[kernel]
        if kernel == "grad_queries" and self.layout == "packed":
            return entry
        return entry._replace(keys=min(entry.keys, _MOST_KEYS[kernel]))

    def _tiles_of_partials(self, channels: int, most_warps: int) -> Tiles:
        """Tiles of a kernel that combines partials of so many channels; no more queries than a row has.

        All warps of a program search for its row, so small tiles have fewer.
        """
        wide, queries = padded(channels), self.queries * self.kv_heads * self.q_per_kv
        block = max(1, min(_TILE_NUMBERS // wide, 1 << max(0, queries - 1).bit_length()))
        if wide >= _WIDE_HEAD:
            most_warps = 8  # in four, Triton 3.6 spills
        return Tiles(block, wide, max(1, min(most_warps, block * wide // _NUMBERS_OF_WARP)), 1)

    def _shape(self, chosen: Tiles, rope: RopeOptions) -> Shape:
        """Shape of the kernels of tiles of one row."""
        # In float32, Triton 3.6 spills where it knows this.
        known = self.layout != "packed" and self.on[0] == 2
        one_tile = known and self.queries * self.heads_per_program <= chosen.queries
        return Shape(
            self.d, self.dv, self.q_per_kv, self.pack, self.packs, self.layout, self.v_is_k, self.cell, one_tile,
            chosen.queries, chosen.keys, padded(self.d), padded(self.dv), *rope, self.precision,
        )  # fmt: skip

    def _short_shape(self, chosen: Tiles, rope: RopeOptions) -> ShortShape:
        """Shape of the kernels of short rows."""
        return self._whole_shape(chosen.keys, chosen, rope)

    def _whole_shape(self, cell: int, chosen: Tiles, rope: RopeOptions) -> ShortShape:
        """Shape of the backward of whole rows of more than `cell` tokens."""
        return ShortShape(
            self.d, self.dv, self.q_per_kv, self.kv_heads, cell, chosen.keys, chosen.queries, self.layout,
            padded(self.d), padded(self.dv), *rope, self.precision,
        )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def geometry(
    state: int, layout: str, score: str, v_is_k: bool, d: int, dv: int, heads: int, kv_heads: int, queries: int,
    itemsize: int, target: Target, precision: str, pairs: int, backward: bool, tiled: bool, option: str,
) -> Geometry:  # fmt: skip
    """The geometry of these sizes, while the tables of tiles are in this state (`_tiles.state`)."""
    return Geometry(
        layout, score, v_is_k, d, dv, heads, kv_heads, queries, itemsize, target, precision, pairs, backward, tiled,
        option,
    )  # fmt: skip
