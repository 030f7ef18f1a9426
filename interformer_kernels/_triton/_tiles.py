"""Tile sizes of the kernels, by kernel, width of the heads, bytes of a number, and device's capability.

The entries were not measured: they are the largest that neither spill registers nor exceed the shared memory of any
device they are for, as compiled ahead of time (`make resources` prints the resources of each). `interformer-kernels
tune` measures the best tiles of a user's own GPU and keeps them in the user's cache directory.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from interformer_kernels._files import DamagedFileError, read_sealed, write_sealed

_log = logging.getLogger("interformer_kernels")


class Tiles(NamedTuple):
    """Queries (or tokens) and keys (or channels) of a tile, and how its program is compiled.

    Attributes:
        maxnreg: registers that a thread may have; None where NVIDIA's assembler weighs spills of a few bytes against
            programs that are resident together.
    """

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Triton's compile options."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


class Target(NamedTuple):
    """A device: "cuda" with its compute capability (90 is 9.0), "hip", or "cpu" for the interpreter."""

    kind: str
    capability: int
    name: str = ""
    processors: int = 132


# kernel -> bytes of a number -> widest head (channels, padded) -> tiles
TABLE: dict[str, dict[int, dict[int, Tiles]]] = {
    "forward": {
        2: {64: Tiles(64, 64), 128: Tiles(64, 32), 256: Tiles(32, 32), 512: Tiles(16, 16)},
        4: {
            32: Tiles(32, 32),
            64: Tiles(32, 32, 8),
            128: Tiles(16, 16),
            256: Tiles(16, 16),
            512: Tiles(16, 16),
        },
    },
    "grad_queries": {
        2: {64: Tiles(64, 64), 128: Tiles(32, 32), 256: Tiles(16, 32), 512: Tiles(16, 16)},
        4: {32: Tiles(16, 32), 64: Tiles(16, 16), 128: Tiles(16, 16, 8), 256: Tiles(16, 16), 512: Tiles(16, 16)},
    },
    "grad_keys": {
        2: {64: Tiles(32, 64), 128: Tiles(32, 32), 256: Tiles(16, 16), 512: Tiles(16, 16)},
        4: {64: Tiles(32, 16, 8), 128: Tiles(16, 16, 8), 256: Tiles(16, 16), 512: Tiles(16, 16)},
    },
    # Several rows of at most `keys` tokens share a tile of `queries`. Wider heads than these have no such kernels.
    "short": {
        2: {64: Tiles(64, 32, 4, 1), 128: Tiles(64, 32, 4, 1)},
        4: {32: Tiles(32, 16, 4, 1)},
    },
    # The backward of rows of more tokens than those, and at most `keys`, in one pass, `queries` at once, and that of
    # longer ones. Wider heads leave no registers for whole rows, nor does float32.
    "whole": {2: {32: Tiles(64, 64, 4, 1)}, 4: {}},
    "whole_long": {2: {16: Tiles(64, 128, 4, 1)}, 4: {}},
    # Entries that replace others where they need another number of warps: the backward of short rows, whose keys must
    # be the forward's, and dQ of packed queries.
    "short_backward": {2: {}, 4: {}},
    "grad_queries_packed": {2: {}, 4: {}},
    # Kernels that rotate: entries that replace those of the same kernel without rotary embedding, for packed queries.
    "forward_rope": {2: {}, 4: {}},
    "grad_queries_rope": {2: {}, 4: {}},
    "grad_keys_rope": {2: {}, 4: {}},
    "short_rope": {2: {}, 4: {}},
    "short_backward_rope": {2: {}, 4: {}},
    "whole_rope": {2: {}, 4: {}},
    "whole_long_rope": {2: {}, 4: {}},
    "personalized_ffn": {2: {128: Tiles(64, 64, 8)}, 4: {128: Tiles(32, 32, 8)}},
    "grad_weight": {2: {128: Tiles(64, 64)}, 4: {128: Tiles(32, 32)}},
}
# Entries that differ on NVIDIA devices of this compute capability or a later one. 8.0: eight warps, where four spill
# (on AMD, eight do). 9.0: its tensor cores, and those of 10.0, multiply at least 64 rows at once, which are queries in
# one pass and keys in the other.
SINCE: dict[int, dict[str, dict[int, dict[int, Tiles]]]] = {
    80: {
        "forward": {2: {128: Tiles(64, 32, 8)}, 4: {256: Tiles(16, 16, 8)}},
        "grad_queries": {2: {256: Tiles(16, 32, 8)}, 4: {128: Tiles(16, 16, 8), 256: Tiles(16, 16, 8)}},
        "grad_queries_packed": {
            2: {64: Tiles(64, 64, 8)},
            4: {32: Tiles(16, 32), 64: Tiles(16, 16), 128: Tiles(32, 16)},
        },
        "grad_keys": {4: {128: Tiles(32, 16, 8), 256: Tiles(16, 16, 8)}},
        "short": {2: {128: Tiles(32, 32, 4, 1)}, 4: {32: Tiles(32, 16, 8, 1), 64: Tiles(32, 16, 8, 1)}},
        "short_backward": {4: {32: Tiles(32, 16, 4, 1), 64: Tiles(32, 16, 4, 1)}},
        "whole": {2: {64: Tiles(64, 64, 4, 1)}},
    },
    90: {
        "forward": {2: {128: Tiles(64, 32)}, 4: {16: Tiles(32, 32, 8), 32: Tiles(32, 16)}},
        "grad_queries": {
            2: {32: Tiles(64, 64), 64: Tiles(64, 64, 8), 128: Tiles(64, 32)},
            4: {16: Tiles(16, 64), 32: Tiles(32, 16), 64: Tiles(16, 16, 8), 128: Tiles(16, 16, 8)},
        },
        "grad_keys": {
            2: {128: Tiles(32, 128, 8)},
            4: {16: Tiles(32, 16, 8), 64: Tiles(32, 16), 128: Tiles(32, 16), 256: Tiles(16, 16)},
        },
        "whole": {2: {128: Tiles(64, 64, 8, 1)}},
        "whole_long": {2: {64: Tiles(128, 128, 8, 1)}},
        "grad_queries_packed": {
            2: {64: Tiles(64, 64)},
            4: {16: Tiles(16, 32, 8), 32: Tiles(32, 16), 64: Tiles(16, 16, 8), 128: Tiles(16, 16, 8)},
        },
        "grad_queries_rope": {4: {16: Tiles(16, 32)}},
        "grad_keys_rope": {4: {32: Tiles(32, 16)}},
        "short_backward_rope": {4: {16: Tiles(32, 16, 4, 1), 32: Tiles(32, 16, 8, 1)}},
        "whole_rope": {2: {64: Tiles(64, 64, 8, 1)}},
    },
    100: {
        "forward": {2: {128: Tiles(64, 32, 8)}},
        "grad_queries": {4: {256: Tiles(16, 16, 16)}},
        "grad_queries_packed": {2: {128: Tiles(64, 32, 8)}},
        "grad_keys": {4: {256: Tiles(16, 32, 8)}},
    },
}


# The widest heads that attention's kernels rotate, by bytes of a number: others have no registers left, and rotary
# embedding is a pass of its own. So it is before 9.0, where operands of tensor cores fill the registers, and from 10.0
# on, for whose tensor memory Triton 3.6 cannot compile the split into pairs of channels.
_ROPE = "_rope"
_WIDEST_ROPE = {2: 64, 4: 32}
_REPLACED = {"grad_queries": ("grad_queries", "grad_queries_packed"), "short_backward": ("short", "short_backward")}


def padded(channels: int) -> int:
    """Channels of a tile: the next power of two, and at least the 16 that tensor cores need."""
    return max(16, 1 << (channels - 1).bit_length())


@functools.cache
def entries(kernel: str, itemsize: int, target: Target) -> Mapping[int, Tiles]:
    """Widest head -> tiles, on a device."""
    if kernel.endswith(_ROPE):
        return _rope_entries(kernel, itemsize, target)
    return _own_entries(kernel, itemsize, target)


def widest_rope(itemsize: int, target: Target) -> int:
    """The widest heads that attention's kernels rotate themselves; 0 where they rotate none."""
    if target.kind == "cuda" and not 90 <= target.capability < 100:
        return 0
    return _WIDEST_ROPE[itemsize]


def _rope_entries(kernel: str, itemsize: int, target: Target) -> Mapping[int, Tiles]:
    plain = kernel.removesuffix(_ROPE)
    by_width: dict[int, Tiles] = {}
    for replaced in (*_REPLACED.get(plain, (plain,)), kernel):
        by_width |= _own_entries(replaced, itemsize, target)
    widest = widest_rope(itemsize, target)
    last = min((width for width in by_width if width >= widest), default=widest) if widest else 0
    return {width: tiles for width, tiles in by_width.items() if width <= last}


def _own_entries(kernel: str, itemsize: int, target: Target) -> Mapping[int, Tiles]:
    if target.kind != "cuda":
        return TABLE[kernel][itemsize]
    if target.capability < 80:
        # Triton has no tensor cores before 8.0, and without them 16-bit tiles take the registers of float32's.
        return TABLE[kernel][4]
    by_width = dict(TABLE[kernel][itemsize])
    for capability in (since for since in sorted(SINCE) if since <= target.capability):
        by_width |= SINCE[capability].get(kernel, {}).get(itemsize, {})
    return by_width


def tiles(kernel: str, width: int, itemsize: int, target: Target) -> Tiles:
    """The entry for heads of `width` channels; entries tuned on this very device take precedence."""
    name, untuned = _entry(kernel, width, itemsize, target)
    tuned = _tuned(target.name) if target.name else {}
    return _forced.get(name) or tuned.get(name) or untuned


@functools.cache
def _entry(kernel: str, width: int, itemsize: int, target: Target) -> tuple[str, Tiles]:
    """Name of the entry for heads of `width` channels, and the package's own tiles."""
    by_width = entries(kernel, itemsize, target)
    bucket = min((w for w in by_width if w >= width), default=max(by_width))
    return key(kernel, bucket, itemsize), by_width[bucket]


def variant(kernel: str, width: int, itemsize: int, target: Target) -> Tiles | None:
    """The entry of a variant of a kernel; None where it has none for heads of that width."""
    if width > max(entries(kernel, itemsize, target), default=0):
        return None
    return tiles(kernel, width, itemsize, target)


# ---------------------------------------------------------------- tuned entries

_TUNED = 4  # fields of tiles that are measured and kept; a limit of registers follows from the call


def key(kernel: str, width: int, itemsize: int) -> str:
    """Name of an entry in the file of tuned tiles."""
    return f"{kernel}/{width}/{8 * itemsize}"


def tuned_file(device: str) -> Path:
    """The file that keeps the tuned tiles of a device."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "interformer_kernels" / f"tiles-{device.replace(' ', '-').replace('/', '-')}.json"


_forced: dict[str, Tiles] = {}
_state = 0


def state() -> int:
    """A number that is another one once other tiles may be chosen: what follows from tiles is kept meanwhile."""
    return _state


def _change() -> None:
    global _state
    _state += 1


@contextlib.contextmanager
def forced(name: str, tiles: Tiles) -> Iterator[None]:
    """Use these tiles for an entry inside of the context, whatever the tables say."""
    _forced[name] = tiles
    _change()
    try:
        yield
    finally:
        del _forced[name]
        _change()


@functools.cache
def _tuned(device: str) -> dict[str, Tiles]:
    file = tuned_file(device)
    try:
        kept = read_sealed(file)
        if not all(map(_are_tiles, kept.values())):
            raise DamagedFileError(f"{file}: damaged: wanted tile sizes and found something else")
    except FileNotFoundError:
        return {}
    except (DamagedFileError, OSError) as error:
        _log.warning("%s; the package's own tiles are taken; remove the file, or run interformer-kernels tune", error)
        return {}
    return {name: Tiles(*numbers) for name, numbers in kept.items()}


def _are_tiles(numbers: object) -> bool:
    return (
        isinstance(numbers, list)
        and len(numbers) == _TUNED
        and all(type(number) is int and number > 0 for number in numbers)
    )


def keep(device: str, tuned: dict[str, Tiles]) -> Path:
    """Keep tuned tiles for later processes, and for this one; if two processes tune at once, the later one wins."""
    file = tuned_file(device)
    _tuned.cache_clear()  # Another process may have tuned since.
    write_sealed(file, {name: list(tiles[:_TUNED]) for name, tiles in {**_tuned(device), **tuned}.items()})
    _tuned.cache_clear()
    _change()
    return file
