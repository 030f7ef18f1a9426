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
WITHOUT_PRODUCTS = frozenset(
    {"rotate_rows", "combine_partials", "epilogue_gradients", "list_long_rows", "sum_sinks", "add_workers"}
    | {"softmax_rows", "sum_rows", "sum_gradients"}
)
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
    path = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if path is None and spec is not None and spec.origin is not None:
        shipped = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        path = str(shipped) if shipped.exists() else None
    if path is None:
        raise FileNotFoundError(f"{name} is neither in PATH nor part of an installed Triton")
    return path


def _lines(flag: str, module: str) -> Iterator[tuple[str, str, str]]:
    """Lines of cuobjdump's output, each with the device and the mangled name of its kernel."""
    command = [tool("cuobjdump"), flag, module]
    environment = {"PATH": f"{Path(tool('nvdisasm')).parent}:/usr/bin:/bin"}  # cuobjdump calls nvdisasm
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        target = kernel = ""
        for line in process.stdout:
            if match := re.match(r"arch = (\w+)", line):
                target = match[1]
            elif match := re.match(r"\s*Function\s*:?\s*(\w+):?$", line):
                kernel = match[1]
            yield target, kernel, line
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ends with status {process.returncode}")


def readable(mangled: Sequence[str]) -> dict[str, str]:
    """`row_products<Float16, true>` of each mangled name."""
    demangled = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    names = {}
    for name, long in zip(mangled, demangled, strict=True):
        short = re.sub(r"\(anonymous namespace\)::|interformer::|cuda::", "", long.removeprefix("void "))
        names[name] = short.split("(")[0]
    return names


def usages(module: str) -> list[Usage]:
    """All kernels in a native module, on all devices that it was built for."""
    registers_and_stack = {}
    for target, kernel, line in _lines("-res-usage", module):
        if match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            registers_and_stack[target, kernel] = int(match[1]), int(match[2])
    products = dict.fromkeys(registers_and_stack, 0)
    for target, kernel, line in _lines("-sass", module):
        if "MMA." in line:
            products[target, kernel] += 1
    names = readable(sorted({kernel for _, kernel in registers_and_stack}))
    kernels = [
        Usage(names[kernel], target, *registers_and_stack[target, kernel], products[target, kernel])
        for target, kernel in registers_and_stack
    ]
    return sorted(kernels, key=lambda usage: (usage.kernel, usage.target))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 where a kernel does not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each kernel")
    chosen = parser.parse_args(arguments)
    module = _backend.native()
    if module is None or not module.build_info()["cuda_built"]:
        print(f"no CUDA part to look at: {_backend._missing('cuda')}", file=sys.stderr)
        return 0
    table = usages(str(module.__file__))
    if chosen.json:
        for usage in table:
            print(json.dumps({**dataclasses.asdict(usage), "fits": usage.fits}))
    else:
        lines = [
            (usage.kernel, usage.target, str(usage.registers), str(usage.stack), str(usage.products),
             "ok" if usage.fits else "DOES NOT FIT")
            for usage in table
        ]  # fmt: skip
        columns = "kernel", "target", "registers", "stack", "tensor-core instructions", ""
        print_table("Resources of the CUDA kernels, as built", columns, lines)
        print(f"{len(table)} kernels, {sum(not usage.fits for usage in table)} do not fit")
    return 0 if table and all(usage.fits for usage in table) else 1


if __name__ == "__main__":
    sys.exit(main())
