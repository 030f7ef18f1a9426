"""The recorded lengths of kernels' main loops, and which of them have grown.

`loops.json` holds them for one target, as one version of Triton compiles them; another version's are not compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import triton

FILE = Path(__file__).with_name("loops.json")
TARGET = "sm_90"
MOST_GROWTH = 1.1


def rises(loops: Mapping[str, int], recorded: Mapping[str, int]) -> list[str]:
    """A line for each loop that has grown by more than a tenth."""
    return [
        f"{name}: the main loop has grown from {recorded[name]} to {loop} instructions"
        for name, loop in loops.items()
        if name in recorded and loop > MOST_GROWTH * recorded[name]
    ]


def recorded() -> dict[str, int]:
    """Instructions of each main loop by `call/width/dtype/kernel#launch`; empty for another version of Triton."""
    record = json.loads(FILE.read_text()) if FILE.exists() else {"triton": ""}
    loops: dict[str, int] = record["loops"] if record["triton"] == triton.__version__ else {}
    return loops


def write(loops: Mapping[str, int]) -> None:
    """Record these loops, and keep what is recorded of others by the same version of Triton."""
    merged = dict(sorted({**recorded(), **loops}.items()))
    FILE.write_text(json.dumps({"triton": triton.__version__, "target": TARGET, "loops": merged}, indent=1) + "\n")
