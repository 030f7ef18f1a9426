"""How commands end: what a user can cause is one line on standard error and exit status 2, for every command alike.

Such are the errors that these packages raise in words of their own, those of the system (files, disks, rights), and
memory that is not there. Everything else is a mistake of the program and keeps its traceback.
"""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Callable
from types import TracebackType

import torch

_PACKAGES = ("interformer", "interformer_kernels", "interformer_bench")
_IN_WORDS = (ValueError, TypeError, RuntimeError, LookupError)
_LONGEST = 1000  # of a line
_RAISE = dis.opmap["RAISE_VARARGS"]
# PyTorch's own words for memory of the CPU that is not there, or that no machine has.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


def guarded(command: Callable[[], int]) -> int:
    """The exit status of `command`; 2, with a line on standard error, for what its user can put right."""
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `... | head`: whoever reads has seen enough, and closing stdout must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line = in_a_line(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        return 2


def in_a_line(error: Exception) -> str | None:
    """The error for its user; None where it is a mistake of the program."""
    said = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in said for words in _NO_MEMORY):
        said = f"not enough memory for these sizes: {said}"
    elif not isinstance(error, OSError) and not (isinstance(error, _IN_WORDS) and _raised_here(error.__traceback__)):
        return None
    line = f"{type(error).__name__}: {said}"
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]} ..."


def _raised_here(trace: TracebackType | None) -> bool:
    """Whether the error comes of a `raise` in these packages, and not of a call or an operation that failed."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "")
    ours = name.partition(".")[0] in _PACKAGES
    return ours and trace.tb_frame.f_code.co_code[trace.tb_lasti] == _RAISE
