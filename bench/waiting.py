"""Waits that a measuring process does without: for threads that spin, and for fresh pages.

OpenMP threads that spin between parallel regions take the processors from whoever else would run on them, most of all
from peers that make many small calls. And glibc gives large blocks back to the system as they are freed, so that the
next call waits until as many pages are cleared, or taken from a virtual machine's host, in some calls for longer than
the operation takes. Both libraries read their variables once, when they are loaded, so a command that finds them
missing starts itself again with them. This module must not import torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

# By the standard, by GCC's library (which PyTorch's wheels for Linux carry), and by LLVM's and Intel's.
_SLEEPING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
_KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_ARENA_MAX": "1"}
ENVIRONMENT = {**_SLEEPING, **_KEPT_MEMORY}


def restart(extra: Mapping[str, str] | None = None) -> None:
    """Replace this process by the same command in this environment, and with `extra`; return where both are set."""
    wanted = {**ENVIRONMENT, **(extra or {})}
    if not _are_set(wanted):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


def described() -> str:
    """How this process waits, for the head of a report."""
    asleep, kept = (_are_set(variables) for variables in (_SLEEPING, _KEPT_MEMORY))
    threads = "Threads sleep while they wait" if asleep else "THREADS MAY SPIN while they wait"
    memory = "freed memory is kept, for all contenders alike" if kept else "FREED MEMORY IS NOT KEPT"
    return f"{threads}; {memory}."


def _are_set(variables: Mapping[str, str]) -> bool:
    return all(os.environ.get(name) == value for name, value in variables.items())
