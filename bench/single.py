"""The command of a bench of one table: its options, its first line, and where the table goes. It must not import torch.

`options`, `candidates` and `requests` are such benches.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from interformer_bench import waiting

T = TypeVar("T")


def parser(name: str, description: str | None, seconds: float) -> argparse.ArgumentParser:
    """The options that all of them have; a call is timed for about so many seconds by default."""
    made = argparse.ArgumentParser(prog=f"python -m interformer_bench.{name}", description=description)
    made.add_argument("--line", action="append", metavar="TEXT", help="lines whose names contain TEXT")
    made.add_argument("--data", type=Path, help="directory with the length files")
    made.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default: %(default)s")
    made.add_argument("--seconds", type=float, default=seconds, help="about how long each call and pass is timed")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the table there")
    return made


def named(lines: Sequence[T], texts: Sequence[str] | None, name: Callable[[T], str] = str) -> list[T]:
    """The lines whose names contain one of the texts; all without texts."""
    return [line for line in lines if not texts or any(text in name(line) for text in texts)]


def child_options(chosen: argparse.Namespace, peak: str) -> list[str]:
    """Arguments by which a process of its own measures the peak of its memory."""
    data = ["--data", str(chosen.data)] if chosen.data else []
    return ["--peak", peak, "--threads", str(chosen.threads), *data]


def head(threads: int, watch: Any, dtype: str = "") -> str:
    """The line above a table: threads, kernels, versions, and how quiet the machine was."""
    import torch
    from interformer_bench import quiet, report

    kernels = f"{threads} threads, {dtype}kernels: {report.isa()}, torch {torch.__version__}. "
    return f"{kernels}{waiting.described()} {quiet.described(watch.checks)}"


def show(cells: Sequence[str]) -> None:
    """Print a row as it is measured."""
    print(" | ".join(cells), flush=True)


def finish(chosen: argparse.Namespace, text: str) -> int:
    """Print the whole, and write it where it is wanted; the exit status."""
    from interformer_kernels._files import write_text

    print(text)
    if chosen.out:
        write_text(chosen.out, text)
    return 0
