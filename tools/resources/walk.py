"""Walks one thread of a kernel through its machine code, and counts the instructions that its warp issues.

Branches of our kernels follow from sizes, offsets and program numbers, which `effects.py` computes; numbers in tensors
of floating-point type are all zero. Barriers, products and asynchronous copies do nothing, and a warp's shuffles and
votes see this thread alone: where other lanes branch differently, the count is an estimate.

Basic blocks are translated into Python functions, once for each kernel.
"""

from __future__ import annotations

import collections
import ctypes
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from resources import effects, operands
from resources.machine_code import Instruction

_MOST_BLOCKS = 5_000_000


class Walked(NamedTuple):
    """Counts of one warp: instructions by name, the sum of their stalls, loads of integer tensors, and the bytes that
    this thread reads and writes in global memory.
    """

    names: collections.Counter[str]
    stalls: int
    index_loads: int
    bytes: int


class Machine:
    """Registers and memory of one thread."""

    def __init__(
        self, constants: bytes, tensors: Sequence[tuple[int, int]], threads: int, grid: int, unwritten: int = 0
    ) -> None:
        """`tensors`: where integer tensors lie; `unwritten`: words of shared memory that this thread did not write."""
        self.constants, self.tensors, self.threads, self.grid = constants, tensors, threads, grid
        self.unwritten = unwritten
        self.program = self.thread = 0
        self.reset(0, 0)

    def reset(self, program: int, thread: int) -> None:
        self.program, self.thread = program, thread
        self.R, self.U = [0] * 260, [0] * 80
        self.P, self.Q = [False] * 7 + [True], [False] * 7 + [True]
        self.shared: dict[int, int] = {}
        self.local: dict[int, int] = {}
        self.index_loads = self.bytes = 0

    def special(self, name: str) -> int:
        return {
            "SR_TID.X": self.thread, "SR_CTAID.X": self.program, "SR_LANEID": self.thread % 32,
            "SR_NTID.X": self.threads, "SR_NCTAID.X": self.grid, "SR_CLUSTERID.X": self.program,
        }.get(name, 0)  # fmt: skip

    def constant(self, offset: int, size: int) -> int:
        return int.from_bytes(self.constants[offset : offset + size].ljust(size, b"\0"), "little")

    def load(self, address: int, size: int) -> int:
        for first, last in self.tensors:
            if first <= address and address + size <= last:
                self.index_loads += 1
                return int.from_bytes(ctypes.string_at(address, size), "little")
        self.bytes += size
        return 0

    def atomic(self, address: int) -> int:
        """A counter of work counts on where the grid ends: no thread gets more."""
        return operands.MASK >> 1

    def store_words(self, memory: dict[int, int], address: int, value: int, size: int) -> None:
        for i in range(0, max(size, 4), 4):
            memory[address + i] = value >> 8 * i & operands.MASK

    def load_words(self, memory: dict[int, int], address: int, size: int) -> int:
        value = 0
        for i in range(0, max(size, 4), 4):
            value |= memory.get(address + i & ~3, self.unwritten) << 8 * i
        return value & (1 << 8 * size) - 1


# ---------------------------------------------------------------- kernels


class _Block(NamedTuple):
    run: Callable[..., int | None]
    names: collections.Counter[str]
    stalls: int


class Kernel:
    """A kernel's machine code, ready to be walked."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        targets = {int(match[1], 16) for one in code if effects.ends(one) and "c[" not in one.operands
                   for match in [re.search(r"0x([0-9a-f]+)", one.operands)] if match}  # fmt: skip
        leaders = {code[0].address} | targets | {one.address + 16 for one in code if effects.ends(one)}
        self.blocks: dict[int, _Block] = {}
        scope: dict[str, Any] = vars(operands).copy()
        starts = [i for i, one in enumerate(code) if one.address in leaders]
        for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
            self.blocks[code[start].address] = self._block(code[start:end], scope)

    def _block(self, code: Sequence[Instruction], scope: dict[str, Any]) -> _Block:
        lines = ["def block(m, R, U, P, Q):"]
        for one in code:
            statements = [effects.jump(one)] if effects.ends(one) else effects.statements(one)
            guard = f"if {operands.predicate(one.guard.strip('@'))}:" if one.guard else "if True:"
            if statements:
                lines += [f" {guard}", *(f"  {line}" for line in statements)]
        lines.append(f" return {code[-1].address + 16}")
        exec("\n".join(lines), scope)
        names = collections.Counter(one.name for one in code)
        return _Block(scope["block"], names, sum(max(1, one.stall) for one in code))

    def walk(self, machine: Machine, program: int, thread: int = 0) -> Walked:
        """The way of one thread of one program."""
        machine.reset(program, thread)
        counts: collections.Counter[int] = collections.Counter()
        at: int | None = next(iter(self.blocks))
        registers = machine.R, machine.U, machine.P, machine.Q
        for _ in range(_MOST_BLOCKS):
            if at is None:
                break
            counts[at] += 1
            at = self.blocks[at].run(machine, *registers)
        else:
            raise RuntimeError("a thread does not come to its end")
        names: collections.Counter[str] = collections.Counter()
        stalls = 0
        for address, times in counts.items():
            for name, number in self.blocks[address].names.items():
                names[name] += number * times
            stalls += self.blocks[address].stalls * times
        return Walked(names, stalls, machine.index_loads, machine.bytes)
