"""OpenMP threads that sleep while they wait for work, in place of spinning.

Threads that spin between parallel regions take the processors from whoever else would run on them, most of all from
peers that make many small calls. The OpenMP library reads its variables when it is loaded, with torch, so a command
that finds them missing starts itself again with them. This module must not import torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

# By the standard, by GCC's library (which PyTorch's wheels for Linux carry), and by LLVM's and Intel's.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


def restart(extra: Mapping[str, str] | None = None) -> None:
    """Replace this process by the same command with sleeping threads, and with `extra`; return where both are set."""
    wanted = {**ENVIRONMENT, **(extra or {})}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


def described() -> str:
    """How threads wait in this process, for the head of a report."""
    if all(os.environ.get(name) == value for name, value in ENVIRONMENT.items()):
        return "Threads sleep while they wait."
    return "THREADS MAY SPIN while they wait: the process was not started by the bench's own command."
