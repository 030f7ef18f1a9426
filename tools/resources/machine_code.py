"""Loops of a kernel in its machine code: instructions by class, stalls, and the cycles that a multiprocessor needs.

`PYTHONPATH=tools python -m resources.machine_code FILE [PATTERN]` prints the loops of a cubin, an object file, or a
library, such as PyTorch's own (`cuobjdump -xelf sm_90 libtorch_cuda.so` extracts its cubins).

A loop is the code between a backward branch and its target. Cycles are lower bounds of one multiprocessor, whose four
schedulers issue one warp instruction each per cycle: by issue, by the special functions (16 lanes a cycle), and by the
sum of the stalls that the assembler has written into the instructions of one warp (bits 41 to 44 of their upper half).
Memory that does not answer in time, and warps that wait for each other, come on top.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from resources.cuda_kernels import readable, tool

SCHEDULERS, SPECIAL_LANES, LANES = 4, 16, 32

# Classes of instructions, by their names, or the beginnings of those where they are longer than three letters.
CLASSES = {
    "tensor": ("HGMMA", "HMMA", "IMMA", "QGMMA", "OMMA", "UTCHMMA", "WGMMA"),
    "special": ("MUFU",),
    "float": ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2"),
    "select": ("FSEL", "FMNMX", "FSETP", "FSET", "FCHK"),
    "convert": ("F2F", "F2FP", "F2I", "F2IP", "I2F", "I2FP"),
    "copy": ("LDGSTS", "UBLKCP", "UTMALDG"),
    "matrix load": ("LDSM",),
    "shared": ("LDS", "STS", "ATOMS"),
    "local": ("LDL", "STL"),
    "global": ("LDG", "STG", "LD", "ST", "ATOM", "RED"),
    "constant": ("LDC", "ULDC", "LDCU"),
    "shuffle": ("SHFL", "VOTE", "REDUX", "MATCH"),
    "wait": ("BAR", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "NANOSLEEP", "SYNCS", "NOP"),
    "branch": ("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "BREAK", "JMP", "BMOV", "BRX"),
}


class Instruction(NamedTuple):
    """One instruction: address, name with its modifiers, operands, cycles until the next of its warp may issue, and
    the predicate that it depends on, `@!P0`.
    """

    address: int
    name: str
    operands: str
    stall: int
    guard: str = ""

    @property
    def kind(self) -> str:
        """Its class; "integer" for addresses, comparisons, moves and bits."""
        base = self.name.split(".")[0]
        for kind, names in CLASSES.items():
            if base in names or base.startswith(tuple(name for name in names if len(name) > 3)):
                return kind
        return "integer"

    @property
    def target(self) -> int | None:
        """The address that a branch goes to."""
        branch = re.search(r"0x([0-9a-f]+)", self.operands) if self.kind == "branch" else None
        return int(branch[1], 16) if branch and self.name.startswith(("BRA", "JMP")) else None


class Loop(NamedTuple):
    """A loop: its instructions by class, tensor instructions by name, and the sum of its stalls."""

    start: int
    end: int
    classes: dict[str, int]
    stalls: int

    @property
    def instructions(self) -> int:
        """Instructions of all classes."""
        return sum(self.classes.values())

    def cycles(self, warps: int) -> dict[str, float]:
        """Lower bounds of one step of a program of so many warps on a multiprocessor, in cycles."""
        return {
            "issue": self.instructions * warps / SCHEDULERS,
            "special": self.classes.get("special", 0) * warps * LANES / SPECIAL_LANES / SCHEDULERS,
            "stalls": float(self.stalls),
        }


def dump(path: Path) -> Iterator[tuple[str, list[Instruction]]]:
    """The kernels of a file by their mangled names."""
    environment = {"PATH": f"{Path(tool('nvdisasm')).parent}:/usr/bin:/bin"}  # cuobjdump calls nvdisasm
    command = [tool("cuobjdump"), "--dump-sass", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name, _, code = part.partition("\n")
        yield name.strip(), list(_instructions(code))


def instructions_of(text: str) -> list[Instruction]:
    """The instructions of a kernel that was dumped by itself."""
    return list(_instructions(text))


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_UPPER_HALF = re.compile(r"^\s*/\* (0x[0-9a-f]{16}) \*/")


def _instructions(code: str) -> Iterator[Instruction]:
    lines = code.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if instruction := _LINE.search(line):
            upper = _UPPER_HALF.match(following)
            stall = int(upper[1], 16) >> 41 & 15 if upper else 0
            yield Instruction(int(instruction[1], 16), instruction[3], instruction[4], stall, instruction[2] or "")


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """All loops of a kernel, outer ones included, by their first instruction."""
    bounds: dict[int, int] = {}
    for instruction in code:
        target = instruction.target
        # An endless loop of one instruction pads the end of a kernel.
        if target is not None and target < instruction.address:
            bounds[target] = max(bounds.get(target, 0), instruction.address)
    return [_loop(code, start, end) for start, end in sorted(bounds.items())]


def _loop(code: Sequence[Instruction], start: int, end: int) -> Loop:
    inside = [instruction for instruction in code if start <= instruction.address <= end]
    classes = collections.Counter(instruction.kind for instruction in inside)
    return Loop(start, end, dict(classes.most_common()), sum(max(1, instruction.stall) for instruction in inside))


def main_loop(code: Sequence[Instruction]) -> Loop | None:
    """The innermost loop with the most tensor instructions, or else with the most of all; None without loops."""
    all_loops = loops(code)
    innermost = [
        loop
        for loop in all_loops
        if not any(loop.start <= inner.start and inner.end <= loop.end for inner in all_loops if inner != loop)
    ]
    return max(innermost, key=lambda loop: (loop.classes.get("tensor", 0), loop.instructions), default=None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the loops of all kernels of a file whose names match."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("pattern", nargs="?", default="", help="a regular expression of kernels' readable names")
    chosen = parser.parse_args(arguments)
    kernels = dict(dump(chosen.file))
    names = readable(sorted(kernels))
    for mangled, code in kernels.items():
        if not re.search(chosen.pattern, names[mangled]):
            continue
        print(f"{names[mangled]}: {len(code)} instructions")
        for loop in loops(code):
            classes = ", ".join(f"{kind} {number}" for kind, number in loop.classes.items())
            print(
                f"  {loop.start:#x} to {loop.end:#x}: {loop.instructions} instructions, stalls {loop.stalls}: {classes}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
