"""`python -m interformer_bench`: see `command.py`."""

from __future__ import annotations

import argparse

from interformer_bench import waiting


def main(arguments: list[str] | None = None) -> int:
    """The same command as `interformer-kernels bench`, by its module's name."""
    if arguments is None:
        waiting.restart()
    # Torch and its OpenMP library read the environment once, when they are imported.
    from interformer_bench import command

    from interformer_kernels._cli.errors import guarded

    parser = argparse.ArgumentParser(prog="python -m interformer_bench", description=command.__doc__)
    command.add_arguments(parser)
    chosen = parser.parse_args(arguments)
    return guarded(lambda: command.run(chosen))


if __name__ == "__main__":
    raise SystemExit(main())
