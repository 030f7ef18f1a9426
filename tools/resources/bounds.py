"""Lower bounds of a launch on an H200, from its machine code: issue, special functions, products, memory, latency."""

from __future__ import annotations

import collections
import math
import random
import re
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch import Tensor

from interformer_kernels._triton._run import Launch
from resources.interpreted import tensors
from resources.machine_code import LANES, Instruction, dump
from resources.triton_kernels import TARGETS, source_of, usage_of_cubin
from resources.walk import Kernel, Machine, Walked

# An H200: multiprocessors, clock, warp instructions and special functions of a multiprocessor a cycle, and what copies
# and matrix products reach.
PROCESSORS, CLOCK = 132, 1.755e9
ISSUE, SPECIAL = 4, 16
COPY, WGMMA, MMA_SYNC = 4.3e12, 790e12, 0.62 * 989e12  # `mma.sync` has 0.62 of the peak at most
REGISTERS, SHARED, WARPS, PROGRAMS = 65536, 228 * 1024, 64, 32  # of a multiprocessor; a program takes 1 KiB more
# Kernels that are bound by issue reach about this share of the bound: FlashAttention 2 does, on H100.
REACHED = 0.575
# Cycles of a dependent load from the first and the second level of caches, and from memory. The first entries that a
# search reads are those of all searches.
_LATENCY_NEAR, _LATENCY_FAR, _LATENCY_DATA, _NEAR_LOADS = 35, 270, 800, 10
_ARGUMENTS = 0x210  # where sm_90 kernels find their arguments in the constant bank
SAMPLE = 48  # programs of a launch that are walked


# ---------------------------------------------------------------- kernels


class Compiled(NamedTuple):
    code: list[Instruction]
    registers: int
    shared: int


def compiled(launch: Launch) -> Compiled:
    """The machine code of a launch for sm_90; Triton's cache keeps what was compiled before."""
    kernel = triton.compile(source_of(launch), target=TARGETS["sm_90"][1], options=launch.tiles.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        ((_, code),) = dump(cubin)
        registers, _ = usage_of_cubin(cubin, ptx, 90)
    return Compiled(code, registers, kernel.metadata.shared)


def head_of_constants(threads: int, grid: int) -> bytearray:
    """The constant bank before the arguments: the sizes of a block and of the grid."""
    return bytearray(struct.pack("<6I", threads, 1, 1, grid, 1, 1).ljust(_ARGUMENTS, b"\0"))


def constants_of(launch: Launch) -> bytes:
    """The constant bank of a launch: its arguments as they are specialised, one behind another."""
    source, bank = source_of(launch), head_of_constants(launch.tiles.warps * LANES, launch.grid)

    def add(kind: Any, value: Any) -> None:
        if isinstance(kind, tuple):
            for one, member in zip(kind, value, strict=True):
                add(one, member)
        elif kind != "constexpr":
            form = "<Q" if kind.startswith("*") else {"i32": "<i", "i64": "<q", "fp32": "<f"}[kind]
            bank.extend(b"\0" * (-len(bank) % struct.calcsize(form)))
            bank.extend(struct.pack(form, value.data_ptr() if isinstance(value, Tensor) else value))

    for i, parameter in enumerate(launch.kernel.params):
        if not parameter.is_constexpr:
            add(source.signature[parameter.name], launch.arguments[i])
    return bytes(bank) + bytes(64)


# ---------------------------------------------------------------- bounds


LIMITS = ("issue", "special", "tensor", "bytes", "latency")


class Bounds(NamedTuple):
    """A launch in microseconds: lower bounds by each limit, and programs."""

    kernel: str
    grid: int
    live: int
    resident: int  # programs that a multiprocessor holds
    instructions: float  # of a warp of a program, on average
    issue: float
    special: float
    tensor: float
    bytes: float
    latency: float

    @property
    def largest(self) -> str:
        return max(LIMITS, key=lambda name: float(getattr(self, name)))

    @property
    def bound(self) -> float:
        return float(getattr(self, self.largest))

    @property
    def expected(self) -> float:
        """The largest bound, where issue, products and special functions reach FlashAttention 2's share of theirs."""
        return max(max(self.issue, self.special, self.tensor) / REACHED, self.bytes, self.latency)


_PRODUCT = {"HGMMA": (r"(\d+)x(\d+)x(\d+)", 4, WGMMA), "HMMA": (r"HMMA\.(16)(8)(16|8)", 1, MMA_SYNC)}


def products_of(names: collections.Counter[str]) -> tuple[float, float]:
    """FLOPs of a warp, and the seconds in which a whole device's tensor cores do them."""
    flops = seconds = 0.0
    for name, times in names.items():
        pattern, warps, rate = _PRODUCT.get(name.split(".")[0], ("", 1, 1.0))
        if pattern and (match := re.search(pattern, name)):
            one = 2 * int(match[1]) * int(match[2]) * int(match[3]) / warps
            if ".TF32" in name:
                rate /= 2
            flops, seconds = flops + one * times, seconds + one * times / rate
    return flops, seconds


def resident_programs(registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor holds at once."""
    of_warp = -(-registers * LANES // 256) * 256
    return max(1, min(REGISTERS // (of_warp * warps), SHARED // (shared + 1024), WARPS // warps, PROGRAMS))


def walked(launch: Launch, kernel: Compiled, sample: int) -> list[Walked]:
    """Some programs of a launch, spread over its grid."""
    ranges = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size())
              for x in tensors(launch.arguments) if not x.is_floating_point()]  # fmt: skip
    machine = Machine(constants_of(launch), ranges, launch.tiles.warps * LANES, launch.grid)
    way = Kernel(kernel.code)
    numbers = range(launch.grid)
    if launch.grid > sample:
        step = launch.grid / sample
        draw = random.Random(0)
        numbers = [int((i + draw.random()) * step) for i in range(sample)]
    return [way.walk(machine, number) for number in numbers]


def _alone(way: Walked) -> float:
    """Cycles of a program that is alone: its stalls, and loads that wait for one another."""
    near = min(way.index_loads, _NEAR_LOADS)
    data = _LATENCY_DATA if _is_live(way) else 0
    return way.stalls + _LATENCY_NEAR * near + _LATENCY_FAR * (way.index_loads - near) + data


def _is_live(walk: Walked) -> bool:
    return any(name.startswith(("HGMMA", "HMMA", "STG", "FFMA")) for name in walk.names)


def bounds_of(launch: Launch, sample: int = SAMPLE) -> Bounds:
    """Bounds of one launch on the whole device."""
    kernel = compiled(launch)
    resident = resident_programs(kernel.registers, kernel.shared, launch.tiles.warps)
    sizes = {(x.data_ptr(), x.numel() * x.element_size()) for x in tensors(launch.arguments)}
    return bounds_from(
        launch.kernel.fn.__name__, launch.grid, walked(launch, kernel, sample), launch.tiles.warps, resident,
        sum(size for _, size in sizes),
    )  # fmt: skip


def bounds_from(name: str, grid: int, ways: Sequence[Walked], warps: int, resident: int, size: int) -> Bounds:
    """Bounds of `grid` programs, of which these are some, whose tensors have `size` bytes."""
    share = grid / len(ways)
    instructions = sum(sum(way.names.values()) for way in ways) * share * warps
    special = sum(times for way in ways for name, times in way.names.items() if name.startswith("MUFU")) * share * warps
    tensor = sum(products_of(way.names)[1] for way in ways) * share * warps
    waves = math.ceil(grid / (PROCESSORS * resident))
    alone = sum(map(_alone, ways)) / len(ways)
    moved = min(sum(way.bytes for way in ways) * share * warps * LANES, size)
    per_second = PROCESSORS * CLOCK
    return Bounds(
        name, grid, round(sum(map(_is_live, ways)) * share), resident,
        sum(sum(way.names.values()) for way in ways) / len(ways),
        1e6 * instructions / (ISSUE * per_second),
        1e6 * special * LANES / (SPECIAL * per_second),
        1e6 * tensor,
        1e6 * moved / COPY,
        1e6 * waves * alone / CLOCK,
    )  # fmt: skip
