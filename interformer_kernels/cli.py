"""The command line: `interformer-kernels COMMAND`, also as `python -m interformer_kernels COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from interformer_kernels._cli import bench, demo, info, parity, tune
from interformer_kernels._cli.errors import guarded

_COMMANDS = {
    "info": (info, "versions, what is built and why not, and which backend each op takes here"),
    "parity": (parity, "hold every backend against float64; exit status 1 on any breach"),
    "bench": (bench, "every op against its peers on named shapes; --out DIR writes a report with pictures"),
    "demo": (demo, "info, parity, speed, and InterFormer trained on clicks; one picture of it"),
    "tune": (tune, "measure the Triton kernels' tile sizes on this machine's GPU, and keep the fastest"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="interformer-kernels", description=__doc__)
    parser.set_defaults(own_process=arguments is None)
    commands = parser.add_subparsers(dest="command", required=True)
    given = sys.argv[1:] if arguments is None else list(arguments)
    for name, (module, purpose) in _COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=module.__doc__)
        command.set_defaults(run=module.run)
        if given[:1] == [name]:  # those of the bench come from a package that others do without
            module.add_arguments(command)
    chosen = parser.parse_args(given)
    return guarded(lambda: chosen.run(chosen))
