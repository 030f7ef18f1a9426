"""`interformer-kernels bench`: this package against its peers on the named shapes; `--out DIR` writes the report.

The same as `python -m interformer_bench`. It needs torch alone; pictures and bars need the extra `bench`:
`pip install 'interformer-kernels[bench]'`.
"""

from __future__ import annotations

import argparse
import importlib.util

# The bench is a package of its own, above this one: it is reached for when the command is called, not before.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own arguments; without it, the command ends here."""
    if importlib.util.find_spec("interformer_bench") is None:
        parser.exit(1, "interformer-kernels bench: interformer_bench is not there; pip install . brings both\n")
    from interformer_bench import command

    command.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write; 1 where this package itself is wrong somewhere."""
    from interformer_bench import command

    return int(command.run(arguments))
