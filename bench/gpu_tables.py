"""The records of a GPU's bench and checks as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from interformer_bench.gpu_place import Record


def tables(records: Iterable[Record]) -> str:
    """Tables of ceilings, ratios, times, what was not timed, and checks."""
    raise NotImplementedError
