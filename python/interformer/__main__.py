"""The command line: `python -m interformer train | experiment`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from interformer._cli import experiment, train
from interformer_kernels import keep_freed_memory
from interformer_kernels._cli.errors import guarded

_COMMANDS = {
    "train": (train, "train one model"),
    "experiment": (experiment, "grids of models and seeds: a table and plots"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m interformer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, purpose) in _COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors in arguments or data print one line on standard error and exit with status 2."""
    options = build_parser().parse_args(arguments)
    return guarded(lambda: options.run(options))


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
