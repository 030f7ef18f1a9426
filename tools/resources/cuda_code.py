"""Machine code of the CUDA kernels for sm_90a, compiled here from the sources as they stand, and kept in `build/`."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from resources.cuda_kernels import readable, tool
from resources.machine_code import Instruction, instructions_of, loops

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "resources"
_FLAGS = ("-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-cubin")


class Code(NamedTuple):
    """A kernel's machine code, and the registers of a thread."""

    instructions: list[Instruction]
    registers: int


def nvcc() -> str | None:
    """The compiler, where there is one."""
    return shutil.which("nvcc")


@functools.cache
def cubins(jobs: int = os.cpu_count() or 1) -> dict[str, Path]:
    """The compiled files by the names of their sources; only those are compiled whose sources have changed."""
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("nvcc is not in PATH")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    headers = sorted((*ROOT.glob("csrc/common/*.h"), *ROOT.glob("csrc/cuda/*.h"), *ROOT.glob("csrc/cuda/*.cuh")))
    common = hashlib.sha256(version.encode() + b"".join(path.read_bytes() for path in headers))
    KEPT.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        key = common.copy()
        key.update(source.read_bytes())
        cubin = KEPT / f"{source.stem}-{key.hexdigest()[:16]}.cubin"
        if not cubin.exists():
            for old in KEPT.glob(f"{source.stem}-*.cubin"):
                old.unlink()
            unfinished = cubin.with_suffix(f".{os.getpid()}")
            command = [compiler, *_FLAGS, "-I", str(ROOT / "csrc"), "-o", str(unfinished), str(source)]
            subprocess.run(command, check=True)
            unfinished.rename(cubin)
        return cubin

    sources = [path for path in sorted(ROOT.glob("csrc/cuda/*.cu")) if "__global__" in path.read_text()]
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip((source.stem for source in sources), pool.map(compiled, sources), strict=True))


def _cuobjdump(*arguments: str) -> str:
    environment = {"PATH": f"{Path(tool('nvdisasm')).parent}:/usr/bin:/bin"}  # cuobjdump calls nvdisasm
    command = [tool("cuobjdump"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


@functools.cache
def kernels() -> dict[str, tuple[Path, str, int]]:
    """File, mangled name and registers of each kernel by its readable name, `attend<BFloat16, 64>`."""
    found = {}
    for cubin in cubins().values():
        usage = _cuobjdump("-res-usage", str(cubin))
        registers = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", usage))
        names = readable(sorted(registers))
        found.update({names[mangled]: (cubin, mangled, int(number)) for mangled, number in registers.items()})
    return found


@functools.cache
def code_of(name: str) -> Code:
    """The machine code of one kernel."""
    cubin, mangled, registers = kernels()[name]
    text = _cuobjdump("--dump-sass", "--function", mangled, str(cubin))
    return Code(instructions_of(text), registers)


def instructions_of_a_copy(code: list[Instruction]) -> float | None:
    """Instructions for each asynchronous copy of 16 bytes, where a kernel makes several one after another, or some in a
    loop of their own: the mean over such places. None where there are none.
    """
    spans = [*_loops_of_copies(code), *_straight_copies(code)]
    copies = sum(number for _, number in spans)
    return sum(length for length, _ in spans) / copies if copies else None


def _is_copy(one: Instruction) -> bool:
    return one.name.startswith("LDGSTS") and ".128" in one.name


def _loops_of_copies(code: list[Instruction]) -> Iterator[tuple[int, int]]:
    """Instructions and copies of the innermost loops that copy and do not multiply."""
    everything = loops(code)
    for loop in everything:
        inside = [one for one in code if loop.start <= one.address <= loop.end]
        innermost = not any(
            loop.start <= other.start and other.end <= loop.end for other in everything if other != loop
        )
        copies = sum(map(_is_copy, inside))
        if innermost and copies and not loop.classes.get("tensor"):
            yield len(inside), copies


def _straight_copies(code: list[Instruction]) -> Iterator[tuple[int, int]]:
    """From one copy to the next, in code without branches."""
    targets = {one.target for one in code}
    start = 0
    for i, one in enumerate(code):
        if one.kind == "branch" or i + 1 == len(code) or code[i + 1].address in targets:
            places = [k for k, inside in enumerate(code[start : i + 1]) if _is_copy(inside)]
            start = i + 1
            if len(places) > 1:
                yield places[-1] - places[0], len(places) - 1
