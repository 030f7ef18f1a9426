"""`make instruction-counts`: instructions of small calls and of rows' starts against the recorded figures.

Counts of one environment are the same in every run, within some tenths of a percent, however busy the machine is. They
are taken on the AVX2 kernels (valgrind knows no AVX-512), on one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from instructions import callgrind, calls
from interformer_kernels import _backend
from interformer_kernels._cli.errors import guarded
from interformer_kernels._cli.tables import print_table
from interformer_kernels._files import to_json, write_text

RECORDED = Path(__file__).with_name("recorded.json")
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "INTERFORMER_CPU_LEVEL": "avx2",
}
# The native module's own instructions, and those of the whole process: Python's, PyTorch's, the C library's.
NATIVE, ALL = "native module", "all"
# A count may exceed its recorded figure by this share.
TOLERANCE = {NATIVE: 0.02, ALL: 0.03}
COLUMNS = ("call", "native module", "recorded", "change", "all", "recorded", "change", "verdict")
Figures = dict[str, dict[str, int]]


class Held(NamedTuple):
    """The kinds of figures that hold in this environment, and why others do not."""

    kinds: tuple[str, ...]
    because: str | None


def environment() -> dict[str, str]:
    """The versions that counts depend on."""
    native = _backend.native()
    if native is None:
        raise RuntimeError("needs the native module, which this installation lacks")
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, "torch": torch.__version__, "compiler": native.build_info()["compiler"]}


def held(here: Mapping[str, str], recorded: Mapping[str, str]) -> Held:
    """A compiler of another version makes another native module; another Python or torch, another way to it."""
    other = [f"{name} {here[name]}, recorded with {recorded[name]}" for name in here if here[name] != recorded[name]]
    if here["compiler"] != recorded["compiler"]:
        return Held((), f"nothing is held against the record: {'; '.join(other)}")
    return (
        Held((NATIVE,), f"only the native module is held: {'; '.join(other)}") if other else Held((NATIVE, ALL), None)
    )


def figures(counted: Sequence[Counter[str]], entries: Sequence[tuple[str, int]]) -> Figures:
    """Instructions of one call or row of each entry `(name, more)`, from its two counts."""
    found: Figures = {}
    for (name, more), first, second in zip(entries, counted[::2], counted[1::2], strict=True):
        differences = Counter(second)
        differences.subtract(first)
        native = sum(count for library, count in differences.items() if library.startswith("_C."))
        found[name] = {NATIVE: round(native / more), ALL: round(sum(differences.values()) / more)}
    return found


def verdict(now: Mapping[str, int], recorded: Mapping[str, int] | None, kinds: Sequence[str]) -> str:
    """Whether the figures hold: MORE where one exceeds its record, or has none."""
    if recorded is None:
        return "MORE: not recorded" if kinds else "-"
    changes = {kind: now[kind] / recorded[kind] - 1 for kind in kinds}
    if any(change > TOLERANCE[kind] for kind, change in changes.items()):
        return "MORE"
    return "fewer" if any(change < -TOLERANCE[kind] for kind, change in changes.items()) else "same" if kinds else "-"


def table(now: Figures, recorded: Figures, kinds: Sequence[str]) -> list[tuple[str, ...]]:
    """The rows of the table, in the order of `COLUMNS`."""
    lines = []
    for name, found in now.items():
        before = recorded.get(name)
        cells = []
        for kind in (NATIVE, ALL):
            change = f"{found[kind] / before[kind] - 1:+.1%}" if before else "-"
            cells += [str(found[kind]), str(before[kind]) if before else "-", change]
        lines.append((name, *cells, verdict(found, before, kinds)))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, and hold against the record; 1 where something takes more instructions than recorded."""
    parser = argparse.ArgumentParser(prog="python -m instructions", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the figures as the new record")
    options = parser.parse_args(arguments)
    reason = callgrind.unsupported_reason()
    if reason is not None:
        raise RuntimeError(f"make instruction-counts {reason}")
    here = environment()
    entries = calls.names()
    now = figures(callgrind.counts(["-m", "instructions.calls"], ENVIRONMENT, 2 * len(entries) + 1), entries)
    if RECORDED.exists():
        recorded = json.loads(RECORDED.read_text())
        kinds, because = held(here, recorded["environment"])
    else:
        recorded, kinds, because = {"figures": {}}, (), f"no record yet: --record writes {RECORDED.name}"
    lines = table(now, recorded["figures"], kinds)
    print_table("instructions", COLUMNS, lines)
    if because:
        print(because)
    if options.record:
        write_text(RECORDED, to_json({"environment": here, "figures": now}))
        return 0
    if any(line[-1] == "fewer" for line in lines):
        print("fewer than recorded: --record keeps the gain")
    return 1 if any(line[-1].startswith("MORE") for line in lines) else 0


if __name__ == "__main__":
    raise SystemExit(guarded(main))
