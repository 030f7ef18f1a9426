"""Sectors of global memory and wavefronts of shared memory that warps of the emulated CUDA kernels ask for.

`INTERFORMER_EMULATE=1 PYTHONPATH=tests/emulated python -m memory OP [--width D] [--length L]` prints them by kernel and
by place in the source, for one batch of rows of equal length; README.md beside this file says what is counted.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

_RUNTIME = ("cuda_runtime.h:", "instructions.cuh:")


class Traffic(NamedTuple):
    """Requests of warps: units (sectors of 32 bytes, or wavefronts), the fewest that their bytes could take, and bytes
    that lanes of one request do not share."""

    requests: int = 0
    units: int = 0
    fewest: int = 0
    bytes: int = 0

    def __add__(self, other: object) -> Traffic:
        if not isinstance(other, Traffic):
            return NotImplemented
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def conflicts(self) -> int:
        """Wavefronts that bank conflicts add, or sectors of bytes that are not wanted."""
        return self.units - self.fewest


class Counts(NamedTuple):
    """By kernel and kind of access; and by kernel, kind, and place in the source (file:line)."""

    kernels: dict[str, dict[str, Traffic]]
    places: dict[tuple[str, str, str], Traffic]

    def of(self, kernel: str, *kinds: str) -> Traffic:
        """The sum of these kinds over all kernels whose names begin so."""
        found = [counts for name, counts in self.kernels.items() if name.startswith(kernel)]
        assert found, f"no kernel {kernel} among {sorted(self.kernels)}"
        return sum((counts.get(kind, Traffic()) for counts in found for kind in kinds), Traffic())


def counted(module: ModuleType, run: Callable[[], object]) -> Counts:
    """The traffic of all kernels that `run` launches."""
    module.count_memory(True)
    try:
        run()
        lines = module.memory_traffic()
    finally:
        module.count_memory(False)
    library = str(module.__file__)
    sources = _sources(library, sorted({place for _, _, place, *_ in lines}))
    kernels: dict[str, dict[str, Traffic]] = defaultdict(lambda: defaultdict(Traffic))
    places: dict[tuple[str, str, str], Traffic] = defaultdict(Traffic)
    for kernel, kind, place, *numbers in lines:
        name = names_of(library)[kernel]
        kernels[name][kind] += Traffic(*numbers)
        places[name, kind, sources[place]] += Traffic(*numbers)
    return Counts(kernels, places)


@functools.cache
def names_of(library: str) -> dict[int, str]:
    """Names of the functions of the module, `attend<BFloat16, 64>`, by their offsets."""
    symbols = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout
    names = {}
    for offset, name in re.findall(r"^([0-9a-f]+) [tTwW] (.*)$", symbols, re.MULTILINE):
        short = re.sub(r"\(anonymous namespace\)::|interformer::|cuda::", "", name.removeprefix("void "))
        names[int(offset, 16)] = short.split("(")[0]
    return names


def _sources(library: str, offsets: list[int]) -> dict[int, str]:
    """`attention_tiles.cuh:99` of each place: the line of the call that a return address follows, or of the call that
    an inlined function of the runtime came from.
    """
    command = ["addr2line", "-a", "-i", "-e", library, *(hex(offset - 1) for offset in offsets)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chains = [lines.splitlines()[1:] for lines in output.split("\n0x")]
    sources = {}
    for offset, chain in zip(offsets, chains, strict=True):
        lines = [line.split(" ")[0].split("/")[-1] for line in chain]
        sources[offset] = next((line for line in lines if not line.startswith(_RUNTIME)), lines[0])
    return sources


def show(counts: Counts) -> None:
    """Print all places, worst first within a kernel."""
    line = "{:44} {:13} {:32} {:>10} {:>10} {:>10} {:>12}"
    print(line.format("kernel", "access", "place", "requests", "units", "fewest", "bytes"))
    for kernel, kinds in sorted(counts.kernels.items()):
        for kind, traffic in kinds.items():
            print(line.format(kernel, kind, "all", *traffic))
        at = [(place, traffic) for place, traffic in counts.places.items() if place[0] == kernel]
        for (_, kind, source), traffic in sorted(at, key=lambda entry: -entry[1].conflicts):
            print(line.format("", kind, source, *traffic))


def main() -> None:
    """Print the traffic of one call, forward and backward."""
    import emulation
    import torch
    from cuda_calls import results

    from interformer_kernels import testing

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", choices=list(testing.OPS))
    parser.add_argument("--width", type=int, default=64, help="channels of a head")
    parser.add_argument("--length", type=int, default=104)
    parser.add_argument("--dtype", default="bfloat16")
    chosen = parser.parse_args()
    module = emulation.load()
    emulation.install(module)
    sizes = {"heads": 1, "kv_heads": 1, "head_size": chosen.width, "value_size": chosen.width, "queries": 2, "tail": 0}
    case = testing.Case(chosen.op, "memory", lengths=(chosen.length,) * 2, **sizes)
    inputs = testing.make_inputs(case, getattr(torch, chosen.dtype))
    show(counted(module, lambda: results(chosen.op, inputs)))


if __name__ == "__main__":
    main()
