"""Ends what a report has started and left: the processes whose environment has its mark.

As a program, `guard.py MARK` waits until its standard input closes, which it does when the report ends in whatever way,
and then ends what is left. A process group does not tell them all: a grandchild may lead a group of its own.
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
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if any(entry.startswith(wanted) for entry in (folder / "environ").read_bytes().split(b"\0")):
                yield int(folder.name)


def end_marked(mark: str) -> set[int]:
    """End them, and what they start meanwhile; the processes that were ended."""
    ended: set[int] = set()
    for _ in range(_ROUNDS):
        found = set(marked(mark)) - {os.getpid()}
        if not found:
            break
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        ended |= found
        time.sleep(_PAUSE)
    return ended


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # its report may have been sent them, and ends it
    sys.stdin.read()
    end_marked(sys.argv[1])
