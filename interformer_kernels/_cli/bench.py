"""`interformer-kernels bench`: compares this package with its peers on named shapes; `--out DIR` writes the report.

The same as `python -m interformer_bench`. It needs torch alone; pictures and progress bars need the extra `bench`:
`pip install 'interformer-kernels[bench]'`.
"""

from __future__ import annotations

import argparse
import importlib.util

# The bench is a package above this one, so it is imported only when the command runs.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own arguments; exits if the bench is not installed."""
    if importlib.util.find_spec("interformer_bench") is None:
        parser.exit(1, "interformer-kernels bench: interformer_bench is not installed; pip install . installs both\n")
    from interformer_bench import command

    command.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write; returns 1 if a result of this package is wrong."""
    from interformer_bench import command, waiting

    if arguments.own_process:
        waiting.restart()
    return int(command.run(arguments))
