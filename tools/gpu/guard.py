"""Ends the processes that a report has left: those whose environment has its mark.

As a program, `guard.py MARK` waits until its standard input closes, which it does when the report ends in whatever way,
and then ends the processes that are left. A process group does not name them all: a grandchild may lead a group of its
own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "INTERFORMER_GPU_STEP"  # the environment variable
_ROUNDS, _PAUSE = 100, 0.02


def marked(mark: str) -> Iterator[int]:
    """Processes that live and whose mark begins with `mark`; none on systems without /proc."""
    prefix = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if any(entry.startswith(prefix) for entry in (folder / "environ").read_bytes().split(b"\0")):
                yield int(folder.name)


def end_marked(mark: str) -> set[int]:
    """End these processes and any that they start meanwhile; returns those that were ended."""
    ended: set[int] = set()
    for _ in range(_ROUNDS):
        processes = set(marked(mark)) - {os.getpid()}
        if not processes:
            break
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        ended |= processes
        time.sleep(_PAUSE)
    return ended


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the report may have received it, and ends its guard itself
    sys.stdin.read()
    end_marked(sys.argv[1])
