"""Loops of the CUDA attention kernels in their machine code for sm_90a, and which of them have grown.

`PYTHONPATH=tools python -m resources.cuda_loops`, part of `make resources`; `--record` writes `cuda_loops.json`.
A tile's loop is the smallest one with most of a kernel's tensor instructions. Inside it, loops of products over
channels run once for each 16 of them; all else counts once, also what a call may not need (copies by 4 bytes, say).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from interformer_kernels._cli.tables import print_table, status_line
from resources import cuda_code
from resources.machine_code import LANES, Instruction, Loop, loops

FILE = Path(__file__).with_name("cuda_loops.json")
TARGET = "sm_90a"
MOST_GROWTH = 1.1
_KERNELS = re.compile(r"^(attend|grad_queries|grad_keys|sum_query_stats)<(BFloat16|Float16|Tf32|float), (\d+)")
_STATIONARY = 16  # rows of a warp
_MOST = 0.6  # of a kernel's tensor instructions, in the loop of a tile


class TileLoop(NamedTuple):
    """One kernel: instructions of a tile for a warp, for each score, and for each 16 bytes that are copied."""

    kernel: str
    registers: int
    tile: int
    per_score: float
    per_copy: float | None
    stalls: int
    classes: dict[str, int]


def _inside(inner: Loop, outer: Loop) -> bool:
    return inner != outer and outer.start <= inner.start and inner.end <= outer.end


def tile_loop(code: Sequence[Instruction], width: int) -> tuple[Loop, int] | None:
    """The loop of a tile, and its instructions with all steps over channels; None without tensor instructions."""
    # Behind the kernel stands code for warps whose lanes have diverged; it jumps back into loops without closing any.
    diverged = min((one.target or 0 for one in code if one.name.startswith("BRA.DIV")), default=code[-1].address + 1)
    everything = loops([one for one in code if one.address < diverged])
    total = sum(one.kind == "tensor" for one in code)
    tiles = [loop for loop in everything if total and loop.classes.get("tensor", 0) >= _MOST * total]
    if not tiles:
        return None
    tile = min(tiles, key=lambda loop: loop.instructions)
    over_channels = [
        loop
        for loop in everything
        if _inside(loop, tile) and loop.classes.get("tensor") and not any(_inside(other, loop) for other in everything)
    ]
    return tile, tile.instructions + sum(loop.instructions for loop in over_channels) * (max(1, width // 16) - 1)


def measured(name: str) -> TileLoop | None:
    """The loop of a kernel by its readable name; None for a kernel without tiles of scores."""
    match = _KERNELS.match(name)
    code = cuda_code.code_of(name) if match else None
    found = tile_loop(code.instructions, int(match[3])) if match and code else None
    if match is None or code is None or found is None:
        return None
    loop, instructions = found
    halves, narrow = match[2] in ("BFloat16", "Float16"), int(match[3]) <= 64
    streamed = 64 if match[1] == "attend" and halves and narrow else 32 if halves or narrow else 16
    per_copy = cuda_code.instructions_of_a_copy(code.instructions)
    return TileLoop(
        name, code.registers, instructions, round(instructions * LANES / (_STATIONARY * streamed), 1),
        None if per_copy is None else round(per_copy, 1), loop.stalls, loop.classes,
    )  # fmt: skip


def rises(found: Mapping[str, Mapping[str, Any]], recorded: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each figure that has grown by more than a tenth."""
    lines = []
    for name, figures in found.items():
        for what, number in figures.items():
            before = recorded.get(name, {}).get(what)
            if before is not None and number is not None and number > MOST_GROWTH * before:
                lines.append(f"{name}: {what} has grown from {before} to {number}")
    return lines


def _version() -> str:
    output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release ([\d.]+)", output)
    return match[1] if match else output.strip()


def recorded() -> dict[str, dict[str, Any]]:
    """The records by kernel; none for another version of the compiler."""
    record = json.loads(FILE.read_text()) if FILE.exists() else {"nvcc": ""}
    kernels: dict[str, dict[str, Any]] = record["kernels"] if record["nvcc"] == _version() else {}
    return kernels


def _show(table: Sequence[TileLoop]) -> None:
    columns = "kernel", "registers", "a tile", "per score", "per 16 bytes copied", "stalls", "static, by class"
    lines = [
        (
            row.kernel, str(row.registers), str(row.tile), str(row.per_score),
            "-" if row.per_copy is None else str(row.per_copy), str(row.stalls),
            ", ".join(f"{kind} {number}" for kind, number in row.classes.items()),
        )
        for row in table
    ]  # fmt: skip
    print_table(f"Loops of the CUDA kernels for {TARGET}: instructions of a warp", columns, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 where a loop has grown by more than a tenth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", default="", help="a regular expression of kernels' names")
    parser.add_argument("--record", action="store_true", help="record the figures")
    chosen = parser.parse_args(arguments)
    if cuda_code.nvcc() is None:
        print("no loops of the CUDA kernels: nvcc is not in PATH", file=sys.stderr)
        return 0
    table = []
    for name in sorted(cuda_code.kernels()):
        status_line(name)
        row = measured(name) if re.search(chosen.kernel, name) else None
        table += [row] if row else []
    status_line("")
    _show(table)
    found = {row.kernel: {"tile": row.tile, "per_copy": row.per_copy} for row in table}
    before = recorded()
    grown = rises(found, before)
    for line in grown:
        print(line, file=sys.stderr)
    if chosen.record:
        record = {"nvcc": _version(), "target": TARGET, "kernels": dict(sorted({**before, **found}.items()))}
        FILE.write_text(json.dumps(record, indent=1) + "\n")
        return 0
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
