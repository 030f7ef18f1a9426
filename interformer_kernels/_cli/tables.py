"""Tables and headings on standard output: by rich on a terminal if it is installed, else in plain text."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence


def _has_rich() -> bool:
    return sys.stdout.isatty() and importlib.util.find_spec("rich") is not None


def heading(text: str) -> None:
    """Print a heading line."""
    print(f"\n== {text}", flush=True)


def status_line(text: str) -> None:
    """Show progress on one line of the terminal, which the next call overwrites; silent without a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:100]}", end="" if text else "\r", file=sys.stderr, flush=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table with a title; a row whose last cell begins with a capital letter (BREACH) is highlighted."""
    lines = [tuple(row) for row in rows]
    if _has_rich():
        _print_rich(title, columns, lines)
        return
    widths = [max(len(line[i]) for line in [tuple(columns), *lines]) for i in range(len(columns))]
    print(title)
    for line in [tuple(columns), tuple("-" * width for width in widths), *lines]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    sys.stdout.flush()


def _print_rich(title: str, columns: Sequence[str], lines: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for line in lines:
        table.add_row(*map(escape, line), style="bold red" if line[-1][:1].isupper() else None)
    Console().print(table)
