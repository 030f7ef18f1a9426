"""`interformer-kernels tune`: measures the Triton kernels' tile sizes on this machine's GPU, and saves the fastest.

They are saved in the user's cache directory ($XDG_CACHE_HOME, or ~/.cache) and read by later processes, so that nothing
is measured or recompiled while a model trains. Remove the file to return to the package's own table.
"""

from __future__ import annotations

import argparse
import sys

import torch

from interformer_kernels import _backend
from interformer_kernels._cli.tables import print_table, status_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments of its own."""


def unsupported_reason() -> str | None:
    """The reason why nothing can be measured on this machine; None if it can."""
    if not torch.cuda.is_available():
        return "needs a GPU that torch can use, found none"
    if _backend.interprets_triton():
        return "TRITON_INTERPRET must not be set: the interpreter's times say nothing about a GPU"
    return _backend.unsupported_reason("jagged_attention", "triton", "cuda", torch.bfloat16)


def run(arguments: argparse.Namespace) -> int:
    """Tune, save and print the fastest tiles."""
    reason = unsupported_reason()
    if reason is not None:
        print(f"interformer-kernels tune: {reason}", file=sys.stderr)
        return 1
    from interformer_kernels._triton import _tune

    tiles_by_key, file = _tune.tune_and_keep(status_line)
    status_line("")
    lines = [(key, *map(str, tiles)) for key, tiles in tiles_by_key.items()]
    print_table(f"Tiles, saved in {file}", ("kernel/width/bits", "queries", "keys", "warps", "stages"), lines)
    return 0
