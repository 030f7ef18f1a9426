"""Registers, stack and tensor-core instructions of every CUDA kernel, read off the built native module.

`PYTHONPATH=tools python -m resources.cuda_kernels`, or `make resources`; `--json` for tests. Spilled registers, and
more shared memory than every device has, are errors of the build already; a stack would be arrays in local memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from interformer_kernels import _backend
from interformer_kernels._cli.tables import print_table

# Kernels without products of tiles. All others use tensor cores for those, except in exact float32.
WITHOUT_PRODUCTS = frozenset({"rotate_rows", "combine_partials", "epilogue_gradients", "list_long_rows"})
MOST_REGISTERS = 255


@dataclasses.dataclass(frozen=True)
class Usage:
    """One kernel on one device: registers and bytes of stack of a thread, tensor-core instructions in its code."""

    kernel: str
    target: str
    registers: int
    stack: int
    products: int

    @property
    def fits(self) -> bool:
        """No stack, and tensor cores exactly where they are claimed."""
        multiplies = self.kernel.split("<")[0] not in WITHOUT_PRODUCTS
        claimed = multiplies and not re.search(r"<float\b", self.kernel)
        return self.stack == 0 and self.registers <= MOST_REGISTERS and (self.products > 0) == claimed


def tool(name: str) -> str:
    """Path of a tool of the CUDA toolkit: the one in PATH, or else the one that Triton ships."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        shipped = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(shipped) if shipped.exists() else None
    if found is None:
        raise FileNotFoundError(f"{name} is neither in PATH nor part of an installed Triton")
    return found


def _lines(flag: str, module: str) -> Iterator[tuple[str, str, str]]:
    """Lines of cuobjdump's output, each with the device and the mangled name of its kernel."""
    command = [tool("cuobjdump"), flag, module]
    environment = {"PATH": f"{Path(tool('nvdisasm')).parent}:/usr/bin:/bin"}  # it calls nvdisasm
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        target = kernel = ""
        for line in process.stdout:
            if found := re.match(r"arch = (\w+)", line):
                target = found[1]
            elif found := re.match(r"\s*Function\s*:?\s*(\w+):?$", line):
                kernel = found[1]
            yield target, kernel, line
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ends with status {process.returncode}")


def readable(mangled: Sequence[str]) -> dict[str, str]:
    """`row_products<Float16, true>` of each mangled name."""
    said = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    names = {}
    for name, long in zip(mangled, said, strict=True):
        short = re.sub(r"\(anonymous namespace\)::|interformer::|cuda::", "", long.removeprefix("void "))
        names[name] = short.split("(")[0]
    return names


def usages(module: str) -> list[Usage]:
    """All kernels in a native module, on all devices that it was built for."""
    taken = {}
    for target, kernel, line in _lines("-res-usage", module):
        if found := re.search(r"REG:(\d+) STACK:(\d+)", line):
            taken[target, kernel] = int(found[1]), int(found[2])
    products = dict.fromkeys(taken, 0)
    for target, kernel, line in _lines("-sass", module):
        if "MMA." in line:
            products[target, kernel] += 1
    names = readable(sorted({kernel for _, kernel in taken}))
    made = [Usage(names[kernel], target, *taken[target, kernel], products[target, kernel]) for target, kernel in taken]
    return sorted(made, key=lambda one: (one.kernel, one.target))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 where a kernel does not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each kernel")
    chosen = parser.parse_args(arguments)
    module = _backend.native()
    if module is None or not module.build_info()["cuda_built"]:
        print(f"no CUDA part to look at: {_backend._missing('cuda')}", file=sys.stderr)
        return 0
    found = usages(str(module.__file__))
    if chosen.json:
        for one in found:
            print(json.dumps({**dataclasses.asdict(one), "fits": one.fits}))
    else:
        lines = [
            (one.kernel, one.target, str(one.registers), str(one.stack), str(one.products),
             "ok" if one.fits else "DOES NOT FIT")
            for one in found
        ]  # fmt: skip
        columns = "kernel", "target", "registers", "stack", "tensor-core instructions", ""
        print_table("Resources of the CUDA kernels, as built", columns, lines)
        print(f"{len(found)} kernels, {sum(not one.fits for one in found)} do not fit")
    return 0 if found and all(one.fits for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
