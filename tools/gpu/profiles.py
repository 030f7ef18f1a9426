"""Nsight Compute on the heaviest kernels: its command lines, and its tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

KERNELS = {"triton": ("attention_forward", "attention_grad_keys"), "cuda": ("attend", "grad_keys")}


def profiling(tool: str, backend: str, target: Path, driver: Sequence[str]) -> list[str]:
    """Profile the first launch of each kernel of a program. The clocks stay as they are."""
    names = "|".join(KERNELS[backend])
    chosen = ["--kernel-name", f"regex:^({names})$", "--launch-count", str(len(KERNELS[backend]))]
    return [tool, "--set", "full", "--clock-control", "none", *chosen, "-f", "--export", str(target), *driver]


def printing(tool: str, source: Path) -> list[str]:
    """Print a profile as a table."""
    return [tool, "--import", str(source), "--csv", "--page", "details"]


def metrics(table: str) -> dict[str, dict[str, str]]:
    """The values of the table, by kernel and `section: name [unit]`."""
    lines = table.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    by_kernel: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        kernel, name, value = (row.get(key) or "" for key in ("Kernel Name", "Metric Name", "Metric Value"))
        if kernel and name:
            unit = f" [{row['Metric Unit']}]" if row.get("Metric Unit") else ""
            by_kernel.setdefault(kernel, {})[f"{row.get('Section Name')}: {name}{unit}"] = value
    return by_kernel
