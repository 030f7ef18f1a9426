"""`python -m interformer_bench`: see `command.py`."""

from __future__ import annotations

import argparse

from interformer_bench import command


def main(arguments: list[str] | None = None) -> int:
    """The command by its module's name; `interformer-kernels bench` is the same."""
    parser = argparse.ArgumentParser(prog="python -m interformer_bench", description=command.__doc__)
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
